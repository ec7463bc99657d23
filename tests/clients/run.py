"""Run checks, one JSON line each: `python -m tests.clients.run URL SUITE.CHECK...`."""

import importlib
import json
import sys
import traceback


def run(url: str, names: list[str]) -> None:
    for name in names:
        suite, _, check = name.partition(".")
        module = importlib.import_module(f"tests.clients.{suite}")
        try:
            getattr(module, check)(url)
            failure = None
        except BaseException:  # what pytest.raises misses is no Exception
            failure = traceback.format_exc()
        print(json.dumps({"check": name, "failure": failure}), flush=True)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
