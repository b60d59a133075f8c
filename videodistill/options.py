"""Options that several commands have, each written once."""

from __future__ import annotations

from typing import Annotated

import typer

Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1...", show_default="cuda where there is one")
]
Precision = Annotated[
    str, typer.Option(help="Of matrix products: fp32, or bf16, faster where the device has it.")
]
