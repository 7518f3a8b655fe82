"""`rankd field`: play the field of a deployed bundle, with or without a shift of its world."""

from pathlib import Path

import click

from rankd_pipeline.errors import RankdError
from rankd_pipeline.settings import settings

FIRST_HOURS_AGO = 7 * 24


@click.command()
@click.argument("function")
@click.option("--shift", "shifts", multiple=True, metavar="NAME", help="Shift the world (repeat for several); --list names them.")
@click.option("--list", "only_list", is_flag=True, help="The shifts that this function's field knows.")
@click.option("--hours", type=click.IntRange(min=1), default=1, show_default=True, help="Hours of the field, one file each.")
@click.option("--rows", type=click.IntRange(min=1), default=1000, show_default=True, help="Decisions an hour, in whole sessions.")
@click.option(
    "--labelled", type=click.FloatRange(0, 1), default=0.2, show_default=True, help="Share of sessions with a full sweep."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the users and their channels.")
@click.option("--bundle", type=click.Path(path_type=Path), help="The bundle that decides (default: what serves now).")
@click.option("--start-hours-ago", type=click.FloatRange(min=0), help="First hour (default: after the last row in the folder).")
def field(
    function: str, shifts: tuple[str, ...], only_list: bool, hours: int, rows: int, labelled: float, seed: int,
    bundle: Path | None, start_hours_ago: float | None,
) -> None:  # fmt: skip
    """Run the deployed bundle of FUNCTION on simulated channels, as a base station would, and write telemetry.

    It goes to RANKD_HOME/telemetry/FUNCTION, one file an hour, each hour after the last one that is there.
    """
    from rankd_pipeline.ran_functions.registry import load_function
    from rankd_pipeline.spec import load_pipeline
    from rankd_pipeline.store.ledger import open_ledger
    from rankd_pipeline.telemetry.field import HOUR_S, Play, known_shifts, play

    config = load_pipeline(function)
    ran_function = load_function(config.function)
    if only_list:
        for name, shift in known_shifts(ran_function).items():
            click.echo(f"{name:18s} {shift.what}")
        return
    current, spec = settings(), config.at()
    folder = current.telemetry_dir(config.pipeline)
    serving = bundle or open_ledger(current, config.pipeline).bundle
    if serving is None:
        raise RankdError(f"{config.pipeline}: nothing serves yet; `rankd run {config.pipeline}`, or give --bundle.")
    start_s = following_hour(folder, start_hours_ago)

    def told(_: int, path: Path) -> None:
        click.echo(path)

    wanted = Play(serving, frozenset(shifts), hours, rows, labelled, seed, start_s)
    steps = spec.steps
    play(ran_function, steps.corpus.simulation, steps.latency_profile.budget_us, wanted, folder, current.workers, told)
    click.echo(f"{hours} hour(s) from {start_s / HOUR_S:.0f} h since 1970, {'+'.join(shifts) or 'no shift'}.", err=True)


def following_hour(folder: Path, hours_ago: float | None) -> float:
    """Start of the hour to play: as asked, or the one after the last row in the folder, or a week ago."""
    import time

    import pyarrow.parquet as pq

    from rankd_pipeline.telemetry.windows import HOUR_S

    last = -1.0
    for path in sorted(folder.glob("[!._]*.parquet")) if hours_ago is None and folder.is_dir() else ():
        try:
            metadata = pq.ParquetFile(path).metadata
            column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == "time_s")
            groups = [metadata.row_group(i).column(column).statistics for i in range(metadata.num_row_groups)]
            last = max([last, *(float(group.max) for group in groups if group is not None and group.has_min_max)])
        except (OSError, StopIteration, ValueError):
            continue  # not one of ours; taking it in will say what is wrong with it
    if last >= 0:
        return (last // HOUR_S + 1) * HOUR_S
    return (time.time() // HOUR_S - (FIRST_HOURS_AGO if hours_ago is None else hours_ago)) * HOUR_S
