"""Machines and their prices, from one file that the user keeps up to date."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.recipe import RecipeError
from training.recipe.overrides import read_yaml
from training.recipe.schema import parse

PRICES = Path(__file__).parents[2] / "yamls" / "hardware" / "prices.yaml"


@dataclass
class Machine:
    """A machine that can be rented, or is owned.

    device: part of the name that torch gives to its GPU. tflops: dense peak of one device, in 10^12 operations a
    second, by precision. watts_per_device: at full load.
    """

    name: str
    device: str
    devices: int
    usd_per_hour: float | None = None
    watts_per_device: float | None = None
    tflops: Any = None


@dataclass
class Prices:
    """The whole file. dated: when somebody last looked the prices up."""

    dated: str
    machines: list[Machine]


def read_prices(path: Path = PRICES) -> Prices:
    """Raises RecipeError, which names the file."""
    try:
        raw = read_yaml(path)
        if isinstance(raw.get("dated"), datetime.date):
            raw["dated"] = str(raw["dated"])
        return Prices(**parse(Prices, raw, path=""))
    except RecipeError as error:
        raise RecipeError("", f"{path}: {error}") from None


def machines_with(prices: Prices, device_name: str) -> list[Machine]:
    """Those whose device has this name."""
    words = device_name.lower().replace("-", " ").split()
    return [one for one in prices.machines if one.device.lower() in words]


@dataclass(frozen=True)
class Bill:
    """What a run costs on a machine; None is unknown."""

    device_hours: float
    kwh: float | None
    usd: float | None


def bill(machine: Machine | None, *, seconds: float, ranks: int) -> Bill:
    """Of a run on `ranks` devices. A machine is paid by its share of devices; energy is that of the devices alone."""
    hours = seconds / 3600 * ranks
    if machine is None:
        return Bill(hours, None, None)
    watts, rate = machine.watts_per_device, machine.usd_per_hour
    return Bill(
        hours,
        None if watts is None else hours * watts / 1000,
        None if rate is None else hours * rate / machine.devices,
    )
