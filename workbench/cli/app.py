"""The commands. Each loads what it needs when it is called, so that ``--help`` is quick."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="The Paper Workbench: read, run and check 185 machine-learning papers.",
)
data_app = typer.Typer(no_args_is_help=True, help="Data sources: what is known, present, licensed.")
app.add_typer(data_app, name="data")

Scale = Literal["smoke", "laptop", "gpu"]
State = Literal["planned", "partial", "done"]
Verdict = Literal["holds", "refuted", "inconclusive", "none"]
PAIR = "-p"
EXIT_CODES = (
    "**Exit codes:** 0 all ran; 1 a notebook failed; 2 wrong use, nothing was started; "
    "3 an identity failed, or with --strict a recorded verdict flipped; 130 interrupted."
)


class _TakesPairs(TyperCommand):
    """A command whose ``-p`` takes exactly two values, any number of times."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined, rest = [], list(args)
        while rest:
            word = rest.pop(0)
            if word == PAIR:
                if len(rest) < 2 or "=" in rest[0]:
                    ctx.fail(f"{PAIR} takes two values: {PAIR} KEY VALUE")
                word = f"{PAIR}{rest.pop(0)}={rest.pop(0)}"
            joined.append(word)
            if word == "--":
                joined, rest = joined + rest, []
        return super().parse_args(ctx, joined)


def _console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; in logs wide enough that a path stays on one line."""
    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(stderr=stderr, width=140, soft_wrap=True)
    return console


def _fail(message: str, code: int = 2) -> typer.Exit:
    _console(stderr=True).print(f"[bold red]error[/] {escape(message)}")
    return typer.Exit(code)


@app.command()
def lab(
    port: Annotated[int, typer.Option(help="Port to serve on; the next free one is taken.")] = 8888,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
) -> None:
    """Open JupyterLab on the index notebook: loopback only, with its token."""
    from workbench.cli import serve

    raise typer.Exit(serve.lab(port=port, browser=browser, console=_console()))


@app.command(cls=_TakesPairs, epilog=EXIT_CODES)
def run(
    families: Annotated[
        list[str] | None, typer.Argument(metavar="FAMILY", help="Default: all notebooks.")
    ] = None,
    scale: Annotated[
        Scale, typer.Option(help="smoke: seconds; laptop: minutes; gpu: one large GPU.")
    ] = "laptop",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    jobs: Annotated[
        int, typer.Option(min=1, help="Notebooks at once; the cores are divided among them.")
    ] = 1,
    executor: Annotated[
        str | None,
        typer.Option(help="Where experiments run: loky, dask, or a Dask scheduler's address."),
    ] = None,
    record: Annotated[
        bool,
        typer.Option(
            "--record",
            help="Write verdicts and costs into data/; at scale laptop outputs into notebooks/.",
        ),
    ] = False,
    param: Annotated[
        list[str] | None,
        typer.Option(PAIR, metavar="KEY VALUE", help="A notebook parameter; may be repeated."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would cost on this machine.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="A flipped verdict is a failure (exit code 3).")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Use no cached result; measures the full cost.")
    ] = False,
    timeout: Annotated[
        int | None, typer.Option(min=1, help="Seconds that one cell may take.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for what the run leaves. Default: runs/<time>.")
    ] = None,
) -> None:
    """Execute notebooks headless, judge their claims, compare them with the ledger.

    Each notebook runs in a kernel of its own; one that fails does not stop the others. Executed
    notebooks, junit.xml, claims.json and summary.json are left in the run's folder. A -p pair wins
    over the option of the same name; a name that a notebook does not know is an error.
    """
    from workbench.cli import run as running
    from workbench.cli.runner import Settings

    order = running.Order(
        families=families or [], scale=scale, device=device, seed=seed,
        typed=[(key, value) for key, _, value in (pair.partition("=") for pair in param or [])],
        settings=Settings(jobs=jobs, executor=executor, fresh=fresh, timeout=timeout),
        record=record, strict=strict, out=out.resolve() if out else None,
    )  # fmt: skip
    try:
        planned = running.plan(order)
    except running.Usage as error:
        raise _fail(str(error)) from None
    if dry_run:
        from workbench.cli import cost

        place = running.automatic_device() if device == "auto" else device.partition(":")[0]
        cost.show(_console(), planned, place, jobs)
        return
    raise typer.Exit(running.execute(order, planned, _console()))


@app.command()
def papers(
    text: Annotated[
        str | None, typer.Argument(help="Words that title, summary, slug or arXiv id contain.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    status: Annotated[State | None, typer.Option(help="Only papers as far as this.")] = None,
    verdict: Annotated[
        Verdict | None, typer.Option(help="Only papers with this verdict; none: not judged yet.")
    ] = None,
    update: Annotated[
        bool,
        typer.Option("--update", help="Derive status columns and README's table, and write them."),
    ] = False,
) -> None:
    """List the papers: how far each one is, and its verdict."""
    from workbench.cli import papers as listing

    if update:
        raise typer.Exit(listing.update(_console()))
    try:
        listing.show(_console(), text=text, family=family, status=status, verdict=verdict)
    except ValueError as error:
        raise _fail(str(error)) from None


@data_app.command("list")
def data_list() -> None:
    """Every data source: kind, size, licence, and whether it is on this machine."""
    from rich.table import Table

    from workbench.lab import data

    table = Table(box=None, pad_edge=False)
    for name in ("name", "kind", "here", "size", "licence", "what"):
        table.add_column(name, justify="right" if name == "size" else "left", overflow="fold")
    for _, row in data.listing().iterrows():
        here = "[green]yes[/]" if row["present"] else "no"
        cells = (escape(str(row[name])) for name in ("licence", "what"))
        size = f"{row['bytes'] / 1e6:.2f} MB"
        table.add_row(escape(row["name"]), row["kind"], here, size, *cells)
    _console().print(table)


@data_app.command("get")
def data_get(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="As `data list` shows it.")],
) -> None:
    """Download a source, check its checksum, keep it in the user's data folder."""
    from rich.progress import Progress

    from workbench.lab import data

    for name in names:
        try:
            with Progress(console=_console(stderr=True), transient=True) as bar:
                task = bar.add_task(name, total=None)
                folder = data.get(
                    name,
                    progress=lambda done, total, b=bar, t=task: b.update(  # type: ignore[misc]
                        t, completed=done, total=total
                    ),
                )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            said = error.args[0] if isinstance(error, KeyError) else error
            raise _fail(f"{name}: {said}", code=1) from None
        _console().print(f"{escape(name)}: {escape(str(folder))}")


@app.command()
def site(
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: site/.")] = None,
) -> None:
    """Build the static site: notebooks with working figures, papers, status, disagreements."""
    from workbench.lab import paths
    from workbench.site import build

    report = build(out or paths.root() / "site")
    _console().print(str(report), markup=False)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Say what is missing here, in which environment, and how to mend it."""
    from workbench.cli import doctor as examination

    raise typer.Exit(examination.run(_console()))


@app.command("new-paper")
def new_paper(
    family: Annotated[str, typer.Argument(help="Existing or new family.")],
    slug: Annotated[str, typer.Argument(help="Name of module, test, section and rows.")],
    title: Annotated[str | None, typer.Option(help="Title, for a paper not yet listed.")] = None,
    year: Annotated[int | None, typer.Option(help="Year of publication.")] = None,
    arxiv: Annotated[str | None, typer.Option(help="arXiv id.")] = None,
    code: Annotated[str | None, typer.Option(help="Authors' repository, owner/name.")] = None,
    summary: Annotated[str | None, typer.Option(help="One line.")] = None,
) -> None:
    """Scaffold one paper: module, test, notebook section, catalogue row."""
    from workbench.cli import scaffold

    given = {"title": title, "year": year, "arxiv": arxiv, "code": code, "summary": summary}
    try:
        report = scaffold.new_paper(family, slug, {k: v for k, v in given.items() if v is not None})
    except ValueError as error:
        raise _fail(str(error)) from None
    for line in report:
        _console().print(line, markup=False, highlight=False)
