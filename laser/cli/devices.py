"""laser devices: what would compute here, and why; with --probe, how fast."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from laser.cli import common, options
from laser.cli.common import say
from laser.errors import RecordError
from laser.spectral.devices import available, exact_products, free_bytes
from laser.spectral.eigen import here
from laser.spectral.measuring import choose_method, chosen_routes, measure_device
from laser.spectral.probe import Probe, cache_path


def devices_verb(
    *,
    where: options.Precise,
    probe: bool,
    disk: Path,
    shown_as: options.Json,
) -> None:
    """`laser devices`, whose arguments and help are in verbs.py."""
    there, chosen = {name: found.what for name, found in available().items()}, where.choose()
    if probe:
        measured, path = measure_device(chosen, disk=disk), cache_path()
        try:
            measured.save(path)
        except OSError as error:  # what was measured is printed all the same
            say(f"laser: warning: {path} cannot be written ({error.strerror}): not kept", aside=True)
            path = None
    else:
        measured, path = _kept(chosen.label), None
    method, why = choose_method("auto", chosen)
    routes = here(chosen_routes(chosen)).stated() if chosen.host_blas else None
    free, exact = free_bytes(chosen), exact_products(chosen.torch_device)
    if shown_as.as_json:
        return common.print_json(
            {
                "available": there,
                "chosen": chosen.label,
                "reason": chosen.reason,
                "eigensolver": "host" if chosen.host_eigensolver else "device",
                "method": method,
                "method_reason": why,
                "routes": routes,
                "free_bytes": free,
                "exact_products": exact,
                "probe": asdict(measured) if measured else None,
            }
        )
    common.print_table(("device", "here"), list(there.items()))
    say(f"takes {chosen.label}: {chosen.reason}")
    say(f"method {method}: {why}")
    if routes:
        say(f"eigenproblems by {routes}")
    memory = "memory unknown" if free is None else f"{free / 2**30:.1f} GiB of memory free"
    say(f"{memory}; products in float32 carry {'all 24 bits' if exact else 'LESS than 24 bits'}")
    if measured:
        _print_probe(measured)
        kept = f"kept in {path or cache_path()}" if path or not probe else "not kept"
        say(kept if probe else f"measured {measured.measured}, {kept}; --probe measures again")
    else:
        say("speed not measured; try --probe")


def _kept(label: str) -> Probe | None:
    """The probe of this device; None where there is none, or none that can be read, which is said."""
    try:
        return Probe.load(label)
    except RecordError as error:
        say(f"laser: warning: {error}", aside=True)
        return None


def _print_probe(probe: Probe) -> None:
    say(f"{probe.name}, torch {probe.torch}, BLAS threads {probe.threads}")
    sides = sorted(probe.eigenvalues)
    table = [(p, probe.eigenvalues[p], probe.eigenvectors.get(p), probe.projector.get(p)) for p in sides]
    common.print_table(("p", "eigenvalues s", "eigenvectors s", "projector s"), table)
    routes = [
        (what, route, p, s) for what, by in probe.routes.items() for route, at in by.items() for p, s in at.items()
    ]
    if routes:
        say(f"routes, with {probe.busy} workers at work")
        common.print_table(("", "route", "p", "s"), routes)
    rates = [("A^T A", probe.product / 1e9, "GFLOP/s"), ("truncation", (probe.projection or 0) / 1e9, "GFLOP/s")]
    copies = {"to device": probe.to_device, "to host": probe.to_host}
    copies |= {"disk read": probe.disk_read, "disk write": probe.disk_write}
    rates += [(what, rate / 1e9, "GB/s") for what, rate in copies.items() if rate]
    say(", ".join(f"{what} {rate:.4g} {unit}" for what, rate, unit in rates))
