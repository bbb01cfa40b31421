"""`tokenclean report RUN`: a finished run as one self-contained page, RUN/report.html.

Input: a run folder, see `report_data`. Output: report.html, charts drawn by Vega-Lite, which vl-convert brings along,
so that the page asks nothing of the network. Its content security policy names the hashes of its two scripts.
"""

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

import vl_convert

from tokenclean_ray.finished import open_finished
from tokenclean_ray.report_data import gather

FILE = "report.html"
SCRIPTS = ("helpers", "distributions", "rounds", "rows", "draw")
MAX_BYTES = 5_000_000


def write_report(url: str, trusted: bool = False) -> str:
    """Write a run's report into its folder; returns where. `trusted` as of `open_finished`.

    Raises:
        UserError: see `open_finished`.
    """
    finished = open_finished(url, trusted)
    finished.store.write_bytes(FILE, page(gather(finished)))
    return f"{finished.store.url}/{FILE}"


def page(data: dict[str, Any]) -> bytes:
    """The structure of `report_data.gather` as a page, UTF-8; example rows are left out until it is small enough."""
    folder = files("tokenclean_ray").joinpath("report_page")
    template = folder.joinpath("page.html").read_text(encoding="utf-8")
    script = "\n".join(folder.joinpath(f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    charts = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    room = MAX_BYTES - len((template + script + charts).encode())
    while len(_json(data)) > room and data["examples"]:
        data = data | {"examples": data["examples"][: len(data["examples"]) // 2]}
    pieces = {
        "@hashes@": f"{_hash(charts)} {_hash(script)}",
        "@charts@": charts,
        "@page@": script,
        "@data@": _json(data),  # the last: what it holds is not searched for marks
    }
    for mark, piece in pieces.items():
        template = template.replace(mark, piece)
    return template.encode()


def _json(data: dict[str, Any]) -> str:
    """ASCII without < and NaN: nothing in it can end the script element, and every parser takes it."""
    plain = json.loads(json.dumps(data), parse_constant=lambda name: None)
    return json.dumps(plain, separators=(",", ":")).replace("<", "\\u003c")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
