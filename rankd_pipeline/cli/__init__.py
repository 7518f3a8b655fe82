"""The `rankd` command: every subcommand, and how errors reach a person (one sentence, an exit code, no traceback)."""

import errno
import sys

import click

from rankd_pipeline.cli.bundles import lineage, predict, profile
from rankd_pipeline.cli.drift import drift, redistill
from rankd_pipeline.cli.field import field
from rankd_pipeline.cli.host import doctor
from rankd_pipeline.cli.reports import ablate, report
from rankd_pipeline.cli.runs import functions, init, plan, run, ui
from rankd_pipeline.cli.serving import history, rollback
from rankd_pipeline.cli.space import gc, pin, unpin
from rankd_pipeline.errors import INTERRUPTED, RankdError
from rankd_pipeline.settings import prepare_environment


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="rankd-pipeline", prog_name="rankd")
def rankd() -> None:
    """Distil large RAN networks into small ones that fit a radio time budget.

    Start with `rankd run beam_management --scale smoke`. Exit codes: 0 done; 1 a step failed; 2 bad input or
    environment; 3 stopped by a gate; 4 another rankd process holds what is needed; 130 interrupted.
    """


COMMANDS = (
    init, run, plan, functions, report, ablate, predict, lineage, profile, field, drift, redistill, history, rollback,
    gc, pin, unpin, doctor, ui,
)  # fmt: skip
for command in COMMANDS:
    rankd.add_command(command)


def main() -> None:
    """Entry point of the `rankd` script and of `python -m rankd_pipeline.cli`."""
    try:
        prepare_environment()
        code = rankd.main(standalone_mode=False)
    except RankdError as error:
        code = _say(str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        code = _say("interrupted. What was finished is stored: the same command goes on from there.", INTERRUPTED)
    except BrokenPipeError:  # `rankd report --json | head`
        sys.stderr.close()
        code = 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        where = f" ({error.filename})" if error.filename else ""
        code = _say(f"{error.strerror}{where}: free space or set RANKD_HOME to a folder you can write, then run again.", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _say(sentence: str, code: int) -> int:
    click.echo(f"rankd: {sentence}", err=True)
    return code
