"""Commands as a test calls them: with words, and with the error itself where ``aen`` would print its line."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aen_lightning.cli.errors import UsageError
from aen_lightning.cli.main import run


def _command(name: str) -> Callable[[Sequence[str]], int]:
    def call(args: Sequence[str]) -> int:
        try:
            run([name, *args])
        except UsageError as error:
            raise (error.__cause__ or error) from None
        return 0

    return call


compare_command = _command("compare")
diagnose_command = _command("diagnose")
evaluate_command = _command("evaluate")
import_command = _command("import")
pull_command = _command("pull")
push_command = _command("push")
report_command = _command("report")
shards_command = _command("shards")
