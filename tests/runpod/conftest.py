"""runpod/ has no package: its files are scripts, which find each other in their own folder."""

import sys
from importlib.util import find_spec

from tests.server import ROOT

FOLDER = ROOT / "runpod"
sys.path.insert(0, str(FOLDER))
# Whether the SDK is installed: without it the name is that of the folder, which has no __init__.py.
# Importing the SDK takes two seconds.
SDK = (_spec := find_spec("runpod")) is not None and _spec.origin is not None
