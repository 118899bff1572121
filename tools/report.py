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
import shlex
import sys
import time

from seqmnist.errors import explain_storage
from tools import cli

PAGE, FOLDER = "report.html", "report"
_KINDS = {".png": "image/png", ".svg": "image/svg+xml"}
# Pictures that not every page has, and what earlier versions drew as pixels.
_OPTIONAL = {"compare.svg", "mistakes.png", "by_step.svg"}
_OPTIONAL |= {f"{name}.png" for name in ("compare", "by_step", "curves", "classes", "gradients")}

_MOST_COLUMNS = 5  # of a table on a phone; a row of a wider one becomes a list there

_STYLE = """
:root { color-scheme: light dark; --text: #222; --line: #ddd; --page: #fff; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 42rem; margin: 0 auto; padding: 1rem; }
p, h1, h2, code, th + td:last-child { overflow-wrap: anywhere; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
nav { columns: 15rem; } nav a { display: block; padding: .2rem 0; color: inherit; }
img { max-width: 100%; height: auto; display: block; margin: 1rem auto; background: #fff;
  border-radius: 4px; }
.made { font-size: .85rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
th, td { text-align: left; padding: .25rem .5rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.notice { border-left: 4px solid #E69F00; padding-left: .8rem; }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --line: #444; --page: #181818; } img { opacity: .92; } }
@media screen and (max-width: 40rem) {
  .cards thead { display: none; } .cards, .cards tbody, .cards tr { display: block; }
  .cards tr { border-bottom: 2px solid var(--line); padding: .5rem 0; }
  .cards td { display: flex; justify-content: space-between; gap: 1rem; border: 0;
    text-align: right; white-space: normal; overflow-wrap: anywhere; }
  .cards td::before { content: attr(data-head); text-align: left; font-weight: 600; flex: none; } }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  h1, h2, p { break-after: avoid; } img, tr, .cards { break-inside: avoid; }
  img { max-height: 200mm; width: auto; } .wide { overflow: visible; }
  table { font-size: 8pt; } .number { white-space: normal; }
  th, td { padding: .15rem .3rem; overflow-wrap: break-word; } }
"""


def render(title: str, sections) -> str:
    """Returns an HTML page of `sections.Section`s, with their pictures inside.

    It says when it was made, and by which command line.
    """
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="made">{made}, by <code>{html.escape(_command())}</code></p><nav>',
        *(f'<a href="#part{i}">{html.escape(each.title)}</a>' for i, each in enumerate(sections)),
        "</nav>",
    ]
    for i, section in enumerate(sections):
        parts.append(f'<h2 id="part{i}">{html.escape(section.title)}</h2>')
        for line in filter(None, section.text.split("\n")):
            notice = ' class="notice"' if line.startswith("NOTICE") else ""
            parts.append(f"<p{notice}>{html.escape(line)}</p>")
        for name, (content, alt) in section.pictures.items():
            kind, data = _KINDS[pathlib.Path(name).suffix], base64.b64encode(content).decode()
            parts.append(f'<img alt="{html.escape(alt)}" src="data:{kind};base64,{data}">')
        if section.table:
            parts.append(f'<div class="wide">{_table(section.table)}</div>')
    return "\n".join([*parts, "</body></html>\n"])


def write(
    workdir: pathlib.Path, title: str, sections, name: str = PAGE, folder: str = FOLDER
) -> pathlib.Path:
    """Writes the page and its pictures, all or nothing; returns the path of the page.

    Pictures of an earlier page go, files of the user stay. Raises UserError if the workdir cannot
    be written.
    """
    from seqmnist.study import export

    page, final = workdir / name, workdir / folder
    pictures = {key: content for each in sections for key, (content, _) in each.pictures.items()}
    remedy = "make room or make it writable, then run the same command again"
    with explain_storage(str(page), remedy):
        with export.replacing(final) as new:
            for key, content in pictures.items():
                (new / key).write_bytes(content)
            aside = new.with_name(name)
            aside.write_text(render(title, sections), encoding="utf-8")
            os.replace(aside, page)
        for key in _OPTIONAL - pictures.keys():
            (final / key).unlink(missing_ok=True)
    return page


def _command():
    """Returns the command line of this process, e.g. python -m tools.report --workdir=runs/a."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", module.name] if module else sys.argv[:1]
    return shlex.join(["python", *program, *sys.argv[1:]])


def _table(table):
    heads, *rows = table
    kind = ' class="cards"' if len(heads) > _MOST_COLUMNS else ""
    parts = [f"<table{kind}>"]
    if heads:
        parts.append(f"<thead><tr>{''.join(_cell(head, 'th') for head in heads)}</tr></thead>")
    for first, *others in rows:
        cells = [_cell(first, "td" if heads else "th", *heads[:1])]
        labels = heads[1:] or [""] * len(others)
        cells += [_cell(value, "td", head) for value, head in zip(others, labels, strict=True)]
        parts.append(f"<tr>{''.join(cells)}</tr>")
    return "".join([*parts, "</table>"])


def _cell(value, tag, head=""):
    text = f"{value:,}" if isinstance(value, int) else str(value)
    kind = ' class="number"' if isinstance(value, int | float) else ""
    label = f' data-head="{html.escape(str(head))}"' if head else ""
    return f"<{tag}{kind}{label}>{html.escape(text)}</{tag}>"


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
