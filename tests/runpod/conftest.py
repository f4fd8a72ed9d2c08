"""runpod/ has no package: its files are scripts, which find each other in their own folder."""

import sys

from tests.server import ROOT

FOLDER = ROOT / "runpod"
sys.path.insert(0, str(FOLDER))
