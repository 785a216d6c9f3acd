"""What `make oldest` runs the suite on: the day, the machine, and each declared lower bound beside the version installed."""

from __future__ import annotations

import datetime
import re
from importlib.metadata import PackageNotFoundError, requires, version

from machine import machine

print(f"make oldest, {datetime.date.today()}")
for name, fact in machine().items():
    print(f"{name}: {fact}")
for declared in sorted({requirement.split(";")[0].strip() for requirement in requires("aikd-losses") or []}):
    name = re.split(r"\[|>", declared)[0]
    try:
        print(f"{declared}: {version(name)}")
    except PackageNotFoundError:
        continue  # of an extra that is not run
