"""Prints what `python -m benchmarks.gpu` has measured."""

import math
from typing import Any


def print_tables(report: dict[str, Any]) -> None:
    """Prints the tables of a report."""
    versions = report["versions"]
    print(f"{report['device']['name']}, torch {versions['torch']}, {report['date']}")
    print(f"`{report['command']}`, {report['seconds']:.0f} s; {report['targets']}")
    if peak := report["peak"]:
        of_sheet = peak["data_sheet_tflops"]
        sheet = "" if of_sheet is None else f", data sheet {of_sheet:,.0f}"
        print(f"one large product: {peak['product_tflops']:,.3g} TFLOP/s{sheet}")
    for name, shape in report["shapes"].items():
        print_shape(name, shape)
    if report["head"]:
        print_heads(report["head"])
    if loading := report["loading"]:
        rates, seconds = loading["gib_per_s"], loading["seconds"]
        print(
            f"\nloading {loading['gib']:.2f} GiB of safetensors: hashed meanwhile "
            f"{rates['hashed']:.2f} GiB/s ({seconds['hashed']:.1f} s), hash known "
            f"{rates['hash_known']:.2f} GiB/s ({seconds['hash_known']:.1f} s)"
        )
    for what, why in report["not_measured"].items():
        print(f"not measured: {what}: {why}")


def print_shape(name: str, shape: dict[str, Any]) -> None:
    """Prints a teacher, with a line for each length."""
    level = "bytes" if shape["exact"] else "tolerance"
    layout = "packed" if shape["is_packed"] else "padded"
    print(
        f"\n{name}, {shape['weights'] / 1e9:.2f} B weights ({shape['gib']:.2f} GiB) made in "
        f"{shape['load_s']:.1f} s, {layout}, exactness {level}"
    )
    print(
        f"{'tokens':>7}{'bare compiled':>15}{'bare':>10}{'engine':>10}{'service':>10}"
        f"{'of bare c.':>12}{'of peak':>9}{'of product':>12}{'encode threads':>16}"
    )
    for length, found in shape["lengths"].items():
        rates, share = found["tokens_per_s"], found["share_of_peak"]["service"]
        of_sheet = share.get("data_sheet")
        of_product = share.get("product")
        print(
            f"{int(length):7,}{rates.get('bare_compiled', math.nan):15,.0f}{rates['bare']:10,.0f}"
            f"{rates['engine']:10,.0f}{rates['service']:10,.0f}"
            f"{percent(found['service_of_bare_compiled']):>12}{percent(of_sheet):>9}"
            f"{percent(of_product):>12}{found['encode_threads']:16}"
        )


def print_heads(heads: list[dict[str, Any]]) -> None:
    """Prints what a row of the head takes."""
    print(f"\nthe head alone, {heads[0]['rows']:,} rows, hidden size {heads[0]['hidden_size']:,}")
    kinds = list(heads[0]["us_per_row"])
    print(f"{'vocabulary':>12}{'TFLOP/s':>10}" + "".join(f"{kind:>14}" for kind in kinds))
    for head in heads:
        times = "".join(f"{head['us_per_row'][kind]:11.2f} us" for kind in kinds)
        print(f"{head['vocabulary']:12,}{head['products_tflops']:10,.3g}{times}")


def percent(share: float | None) -> str:
    """Writes a share, if it is known."""
    return "-" if share is None else f"{share:.1%}"
