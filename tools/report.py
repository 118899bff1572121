"""Writes DIR/report.html: what a run learned and how its network reads, in pictures.

Example:
  python -m tools.report --workdir=runs/notebook
  python -m tools.report --workdir=runs/lstm --compare runs/notebook runs/gru

The page needs no network and no other file. Its pictures are also written to DIR/report. Runs to
compare with share one table and one set of axes with DIR.
"""

import base64
import html
import os
import pathlib

from seqmnist.errors import explain_storage
from tools import cli

PAGE, FOLDER = "report.html", "report"
_OPTIONAL = {"compare.png", "mistakes.png", "by_step.png"}  # pictures that not every page has

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 42rem; margin: 0 auto;
  padding: 1rem; }
p, h1 { overflow-wrap: anywhere; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem auto; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
th, td { text-align: left; padding: .25rem .5rem; border-bottom: 1px solid #ddd;
  vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.notice { border-left: 4px solid #E69F00; padding-left: .8rem; }
"""


def render(title: str, sections) -> str:
    """Returns an HTML page of `sections.Section`s, with their pictures inside."""
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        for line in filter(None, section.text.split("\n")):
            notice = ' class="notice"' if line.startswith("NOTICE") else ""
            parts.append(f"<p{notice}>{html.escape(line)}</p>")
        for content, alt in section.pictures.values():
            data = base64.b64encode(content).decode()
            parts.append(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">')
        if section.table:
            parts.append(f'<div class="wide"><table>{_rows(section.table)}</table></div>')
    return "\n".join([*parts, "</body></html>\n"])


def write(workdir: pathlib.Path, title: str, sections) -> pathlib.Path:
    """Writes the page and its pictures, all or nothing; returns the path of the page.

    Pictures of an earlier page go, files of the user stay. Raises UserError if the workdir cannot
    be written.
    """
    from seqmnist.study import export

    page, final = workdir / PAGE, workdir / FOLDER
    pictures = {name: png for each in sections for name, (png, _) in each.pictures.items()}
    remedy = "make room or make it writable, then run the same command again"
    with explain_storage(str(page), remedy):
        with export.replacing(final) as folder:
            for name, png in pictures.items():
                (folder / name).write_bytes(png)
            aside = folder.with_name(PAGE)
            aside.write_text(render(title, sections), encoding="utf-8")
            os.replace(aside, page)
        for name in _OPTIONAL - pictures.keys():
            (final / name).unlink(missing_ok=True)
    return page


def _rows(table):
    heads, *rows = table
    parts = [f"<tr>{''.join(_cell(value, 'th') for value in heads)}</tr>"] if heads else []
    for first, *others in rows:
        cells = [_cell(first, "td" if heads else "th"), *(_cell(value, "td") for value in others)]
        parts.append(f"<tr>{''.join(cells)}</tr>")
    return "".join(parts)


def _cell(value, tag):
    text = f"{value:,}" if isinstance(value, int) else str(value)
    kind = ' class="number"' if isinstance(value, int | float) else ""
    return f"<{tag}{kind}>{html.escape(text)}</{tag}>"


def _main(arguments):
    from seqmnist.workdir import Workdir
    from tools import sections as section_lib  # here, not above: --help needs no JAX

    sections, numbers = section_lib.examine(
        arguments.workdir, arguments.member, arguments.checkpoint
    )
    if arguments.compare:
        sections.insert(1, section_lib.compare([arguments.workdir, *arguments.compare]))
    workdir = Workdir(arguments.workdir).path
    page = write(workdir, f'Run "{workdir.name}": what it learned', sections)
    test = numbers["test"]
    print(f"Test accuracy: {test['accuracy']:.4f}, {test['mistakes']:,} mistakes")
    print(f"Report: {page} ({page.stat().st_size:,} bytes)")
    return numbers


def _make_parser():
    parser = cli.make_parser(__doc__)
    cli.add_workdir_argument(parser)
    parser.add_argument("--compare", nargs="+", default=[], metavar="DIR", help="other runs")
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
