"""The configuration of HAProxy: what is changed in the one that Ray Serve writes."""

import re
import subprocess
from pathlib import Path

import pytest

from serve_app.launch import haproxy_rules
from serve_app.launch.launcher import haproxy as environment
from tests.launch.haproxy_configuration import generated


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    return generated(tmp_path)


def test_every_rule_finds_its_line_in_the_template_of_the_installed_ray(
    configuration: Path,
) -> None:
    before = configuration.read_text()
    after = haproxy_rules.rewritten(before)
    assert re.search("^ *option splice", before, re.MULTILINE)
    assert not re.search("^ *option splice", after, re.MULTILINE)
    assert not re.search(r"bind \*?:", after)
    for status in (502, 503, 504):
        assert f"http-error status {status} content-type application/json" in after
    assert "errorfile" not in after


def test_a_template_without_a_line_to_change_is_refused(configuration: Path) -> None:
    text = configuration.read_text().replace("option splice-re", "option other-re")
    with pytest.raises(haproxy_rules.UnknownTemplate, match="splicing"):
        haproxy_rules.rewritten(text)


def test_before_there_is_an_application_there_is_nothing_to_change_for_one(tmp_path: Path) -> None:
    text = haproxy_rules.rewritten(generated(tmp_path, applications=False).read_text())
    assert "await_replica" not in text


def test_it_is_rewritten_once(configuration: Path) -> None:
    once = haproxy_rules.rewritten(configuration.read_text())
    assert haproxy_rules.rewritten(once) == once


def test_haproxy_accepts_what_is_written(configuration: Path) -> None:
    result = environment()
    if not result:
        pytest.skip("ray[serve] brings no HAProxy for this platform")
    wrapper = result["RAY_SERVE_HAPROXY_BINARY_PATH"]
    done = subprocess.run(
        [wrapper, "-c", "-f", str(configuration)], env=result, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert configuration.read_text().startswith(haproxy_rules.MARK)


def test_haproxy_does_not_start_with_a_template_that_is_not_known(configuration: Path) -> None:
    result = environment() or {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(
            Path(haproxy_rules.__file__).parent / "start_haproxy.sh"
        )
    }
    configuration.write_text("global\n")
    done = subprocess.run(
        [result["RAY_SERVE_HAPROXY_BINARY_PATH"], "-f", str(configuration)],
        env={**result, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "configuration of HAProxy has changed" in done.stderr
