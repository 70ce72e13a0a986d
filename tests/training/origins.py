"""Give the commands in the order of a list, all in this process: what each ends with and says.

argv: the list, as JSON: [{"name", "words": [script, …], and what to do first: "stop": a run to be stopped after its
first step, "move": [from, to], "damage": a file}, …]; where to write {name: {"status", "said", "error"}}.
"""

import io
import json
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

from pretrain.errors import InputError

commands, out = json.loads(sys.argv[1]), Path(sys.argv[2])
told = {}
for command in commands:
    if "stop" in command:
        Path(command["stop"]).mkdir(exist_ok=True)
        (Path(command["stop"]) / "STOP").touch()
    if "move" in command:
        Path(command["move"][0]).rename(command["move"][1])
    if "damage" in command:
        file = Path(command["damage"])
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    sys.argv = command["words"]
    said, status, error = io.StringIO(), None, None
    with redirect_stdout(said):
        try:
            status = runpy.run_path(sys.argv[0])["main"]()
        except InputError as refused:
            status, error = 2, str(refused)
        except SystemExit as ended:
            status = ended.code
    told[command["name"]] = {"status": status, "said": said.getvalue(), "error": error}
out.write_text(json.dumps(told))
