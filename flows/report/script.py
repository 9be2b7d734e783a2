"""The only script of the pages, and its hash, by which their content security policy allows it and nothing else."""

import base64
import hashlib
from pathlib import Path

SCRIPT = "\n" + (Path(__file__).parent / "templates" / "page.js").read_text()
SCRIPT_HASH = "sha256-" + base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
