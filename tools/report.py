"""Writes DIR/report.html: what a run learned and how its network reads, in pictures.

Example:
  python -m tools.report --workdir=runs/notebook
  python -m tools.report --workdir=runs/lstm --compare runs/notebook runs/gru

The page needs no network and no other file. Its pictures are also written to DIR/report: SVG where
they are lines, PNG otherwise. The runs of --compare share one table and one set of axes with DIR.
"""

import base64
import datetime
import html
import pathlib
import re
import shlex
import sys

from seqmnist.errors import explain_storage
from seqmnist.workdir import REPORT, WRITTEN, Workdir, replacing, write_aside
from tools import cli

PAGE, FOLDER = f"{REPORT}.html", REPORT
_CARDS_ABOVE = 5  # columns: on a phone, each row of such a table is a list of labeled values
_LONG = 24  # letters; longer cells may be broken anywhere

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 48rem; margin: 0 auto; padding: 1rem; }
p, h1, h2, li, pre, figcaption, .long { overflow-wrap: anywhere; }
figure { margin: 1rem 0; } p, figcaption { max-width: 42rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
pre { white-space: pre-wrap; font-size: .8rem; border-left: 4px solid #8886; padding-left: .8rem; }
nav ul { columns: 14rem; padding-left: 1.2rem; }
img { max-width: 100%; height: auto; display: block; margin: 0 auto .5rem; background: white; }
img[src^="data:image/svg"] { width: 100%; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
th, td { text-align: left; padding: .25rem .4rem; border-bottom: 1px solid #8886;
  vertical-align: top; }
.facts td { overflow-wrap: anywhere; } .facts th { min-width: 6rem; }
.long { min-width: 7em; } .cards { font-size: .875em; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.notice { border-left: 4px solid #E69F00; padding-left: .8rem; }
@media (prefers-color-scheme: dark) { img { border: .5rem solid white; box-sizing: border-box; } }
@media screen and (max-width: 44rem) {
  .plain { font-size: .875em; }
  .cards thead { display: none; }
  .cards, .cards tbody, .cards tr { display: block; font-size: 1rem; }
  .cards tr { border-bottom: 1px solid #8886; padding: .5rem 0; }
  .cards td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: 0;
    min-width: 0; text-align: right; white-space: normal; }
  .cards td::before { content: attr(data-label); text-align: left; flex: none; max-width: 55%; }
  .cards td:first-child { font-weight: bold; }
}
@media print {
  :root { color-scheme: light; } body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { break-after: avoid; margin-top: 1.5rem; } p { orphans: 3; widows: 3; }
  .together, figure, tr { break-inside: avoid; } .together:not(:has(img)) { break-after: avoid; }
  summary { display: none; }
  img, img[src^="data:image/svg"] { max-width: 13cm; max-height: 20cm; margin: .5rem auto; }
  .wide { overflow: visible; } th, td { padding: .15rem .3rem; }
  section:has(details) { break-before: page; } details pre { columns: 2; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""


def render(title: str, sections) -> str:
    """Returns an HTML page of `sections.Section`s, with their pictures inside.

    It says when it was made, in a line of its own, and by which command line.
    """
    now = datetime.datetime.now(datetime.UTC)
    anchors = [re.sub(r"\W+", "-", section.title.lower()).strip("-") for section in sections]
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f"<p>Page made on {now:%Y-%m-%d at %H:%M} UTC by</p>",
        f"<pre>{html.escape(shlex.join(['python', *sys.orig_argv[1:]]))}</pre>",
        '<nav aria-label="Contents"><ul>',
        *(
            f'<li><a href="#{anchor}">{html.escape(section.title)}</a></li>'
            for anchor, section in zip(anchors, sections, strict=True)
        ),
        "</ul></nav>",
    ]
    for anchor, section in zip(anchors, sections, strict=True):
        # The heading is printed on one page with the first picture.
        parts.append(f'<section id="{anchor}"><div class="together">')
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        for line in filter(None, section.text.split("\n")):
            notice = ' class="notice"' if line.startswith("NOTICE") else ""
            parts.append(f"<p{notice}>{html.escape(line)}</p>")
        images = map(_image, section.pictures, section.pictures.values())
        first, *others = [*images] or [""]
        parts += [first, "</div>", *others]
        if section.table:
            parts.append(f'<div class="wide">{_table(section.table)}</div>')
        if section.code:
            code = html.escape(section.code)
            parts.append(f"<details><summary>Show</summary><pre>{code}</pre></details>")
        parts.append("</section>")
    return "\n".join([*parts, "</body></html>\n"])


def write(
    workdir: pathlib.Path, title: str, sections, name: str = PAGE, folder: str = FOLDER
) -> pathlib.Path:
    """Writes the pictures and then the page; returns the path of the page.

    Pictures of an earlier page are removed, files of the user are kept. Raises UserError if the
    workdir cannot be written.
    """
    page, final = workdir / name, workdir / folder
    pictures = {key: content for each in sections for key, (content, *_) in each.pictures.items()}
    remedy = "make room or make it writable, then run the same command again"
    with explain_storage(str(page), remedy):
        with replacing(final) as new:
            for key, content in pictures.items():
                (new / key).write_bytes(content)
        write_aside(page, render(title, sections).encode())
        kinds = {f"{key[:-3]}{kind}" for key in pictures for kind in ("png", "svg")}
        for key in kinds.union(WRITTEN[REPORT]) - pictures.keys():
            (final / key).unlink(missing_ok=True)
    return page


def _image(name, picture):
    kind = "svg+xml" if name.endswith(".svg") else "png"
    data = base64.b64encode(picture.content).decode()
    image = f'<img alt="{html.escape(picture.alt)}" src="data:image/{kind};base64,{data}">'
    return f"<figure>{image}<figcaption>{html.escape(picture.look)}</figcaption></figure>"


def _table(table):
    heads, *rows = table
    if not heads:
        lines = [[_cell(first, "th"), *map(_cell, others)] for first, *others in rows]
        return f'<table class="facts">{_lines(lines)}</table>'
    kind, top = "cards" if len(heads) > _CARDS_ABOVE else "plain", [_cell(x, "th") for x in heads]
    lines = [[_cell(x, "td", head) for x, head in zip(row, heads, strict=True)] for row in rows]
    return f'<table class="{kind}"><thead>{_lines([top])}</thead>{_lines(lines)}</table>'


def _lines(lines):
    return "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in lines)


def _cell(value, tag="td", label=None):
    text = html.escape(f"{value:,}" if isinstance(value, int) else str(value))
    kind = "long" if tag == "td" and len(text) > _LONG else ""
    kind = "number" if isinstance(value, int | float) else kind
    # Where a long name may be broken; in headings, also names of fields.
    text = re.sub(r"(?<=[_.])" if tag == "th" else "(?<=_)", "<wbr>", text)
    kind = f' class="{kind}"' if kind else ""
    label = f' data-label="{html.escape(str(label))}"' if label else ""
    return f"<{tag}{kind}{label}>{text}</{tag}>"


def _main(arguments):
    from tools import sections as section_lib  # imported here: --help needs no JAX

    sections, numbers = section_lib.examine(arguments.workdir, **cli.chosen(arguments))
    if arguments.compare:
        sections.insert(1, section_lib.compare([arguments.workdir, *arguments.compare]))
    workdir = Workdir(arguments.workdir).path
    page = write(workdir, f'Run "{workdir.name}": what it learned', sections)
    test = numbers["test"]
    print(f"Test accuracy: {test['accuracy']:.4f}, mistakes: {test['mistakes']:,}")
    print(f"Report: {page} ({page.stat().st_size:,} bytes)")
    return numbers


def _make_parser():
    parser = cli.make_parser(__doc__)
    cli.add_workdir_argument(parser)
    cli.add_place_arguments(parser)
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="DIR", help="folders of other runs"
    )
    return parser


if __name__ == "__main__":
    cli.run(_make_parser(), _main)
