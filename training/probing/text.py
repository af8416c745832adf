"""What a probe says, as text."""

from __future__ import annotations

import os

from training.probing.machines import Machine, bill
from training.probing.predict import PhasePrediction
from training.probing.probe import Report

_REPAIRS = {
    "loader": "more data.train.num_workers (here {workers}; the machine has {cores} cores), or fewer augmentations",
    "host": "compile=true, or a larger microbatch: the device waits for the host to launch its work",
    "device": "smaller images or a cheaper model{compile}; the loader would keep up",
}


def format_report(report: Report) -> str:
    """The report for people."""
    total, plan = report.prediction.total, report.plan
    ranks = plan.place.world_size
    lines = [
        f"{plan.recipe.run_name} on {ranks} {'rank' if ranks == 1 else 'ranks'} ({report.device_name}, "
        f"{plan.recipe.precision}); probed for {report.took_seconds:.0f} s, load {report.load:.1f} beforehand on "
        f"{os.cpu_count()} cores",
        "",
        f"{'image':>8}{'batch':>8}{'epochs':>8}{'steps':>9}{'s/step':>10}{'images/s':>10}{'MFU':>7}{'wait':>6}"
        f"{'time':>11}  bottleneck",
        *(_phase_line(report, index, one) for index, one in enumerate(report.prediction.phases)),
        *_rest_lines(report),
        "",
        f"predicted: {duration(total.mean)} ({duration(total.low)} to {duration(total.high)}) of training, evaluation "
        "and checkpoints; start-up comes on top",
        *_notes(report),
        *_repair_lines(report),
        *_cost_lines(report),
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them: 4.2 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    for limit, large, small in ((3600, 60, 1), (86400, 3600, 60), (float("inf"), 86400, 3600)):
        if seconds < limit:
            names = {1: "s", 60: "min", 3600: "h", 86400: "d"}
            whole = round(seconds / small)
            parts, rest = divmod(whole, large // small)
            return f"{parts} {names[large]} {rest} {names[small]}"
    raise AssertionError("the last limit is infinite")


def _phase_line(report: Report, index: int, one: PhasePrediction) -> str:
    phase, times = one.phase, report.measured.phases.get(index)
    if report.peak_flops is None:
        share = "?"
    else:
        ranks = report.plan.place.world_size
        share = f"{2 * phase.macs / ranks / one.step.mean / report.peak_flops:.0%}"
    notes = [report.bottlenecks.get(index, "not measured: between its neighbors"), *phase.notes]
    return (
        f"{f'{phase.image_size} px':>8}{phase.global_batch_size:>8,}{phase.epochs:>8}{phase.steps * phase.epochs:>9,}"
        f"{one.step.mean:>10.4f}{one.images_per_second:>10,.0f}{share:>7}"
        f"{f'{times.wait_share:.0%}' if times else '':>6}{duration(one.total.mean):>11}  {', '.join(notes)}"
    )


def _rest_lines(report: Report) -> list[str]:
    made = report.prediction
    peak = max((times.peak_bytes for times in report.measured.phases.values()), default=0)
    of = "of the GPU" if report.plan.place.device == "gpu" else "of the process"
    return [
        "",
        f"evaluation: {made.evaluations} x {made.evaluation.mean:.3g} s; checkpoint: {made.checkpoints} x "
        f"{made.checkpoint.mean:.3g} s",
        f"between epochs: {duration(sum(one.between.mean * one.phase.epochs for one in made.phases))} in all (part of "
        f"the phases' times); start: {duration(report.measured.start)}; peak memory: {peak / 1e9:.2f} GB {of}",
    ]


def _notes(report: Report) -> list[str]:
    ranks, sent = report.plan.place.world_size, report.communication_seconds
    lines = (
        [] if report.peak_flops is None else [f"MFU: of {report.peak_flops / 1e12:.3g} TFLOP/s, {report.peak_source}"]
    )
    if ranks > 1 and sent is None:
        lines.append(
            f"communication of {ranks} ranks: unknown, since this machine cannot run as many; it is taken as 0, so the "
            "prediction is a lower bound"
        )
    elif ranks > 1:
        lines.append(
            f"communication: {sent:.4f} s a step, measured between {ranks} processes here; the range's low end takes "
            "it as hidden behind the backward pass. Each rank is taken to be as fast as this process alone."
        )
    cores = os.cpu_count() or 1
    if report.load > cores / 2:
        lines.append(
            f"the machine was busy (load {report.load:.1f} on {cores} cores): the run is predicted as if it stays so"
        )
    return lines


def _repair_lines(report: Report) -> list[str]:
    recipe = report.plan.recipe
    compiling = "" if recipe.compile else ", or compile=true"
    return [
        f"what would lift the {name}: "
        + _REPAIRS[name].format(workers=recipe.data.train.num_workers, cores=os.cpu_count(), compile=compiling)
        for name in sorted(set(report.bottlenecks.values()))
    ]


def _cost_lines(report: Report) -> list[str]:
    seconds, ranks = report.prediction.total.mean, report.plan.place.world_size
    hours = bill(None, seconds=seconds, ranks=ranks).device_hours
    unit = "GPU-hours" if report.plan.place.device == "gpu" else "device-hours"
    lines = [f"{unit}: {hours:.3g}"]
    if not report.machines:
        return [
            *lines,
            f"energy and money: unknown; no machine with {report.device_name} in yamls/hardware/prices.yaml",
        ]
    return lines + [_cost_line(one, seconds, ranks, report.prices.dated) for one in report.machines]


def _cost_line(machine: Machine, seconds: float, ranks: int, dated: str) -> str:
    found = bill(machine, seconds=seconds, ranks=ranks)
    energy = "energy unknown" if found.kwh is None else f"{found.kwh:.3g} kWh of the devices alone"
    money = "price unknown" if found.usd is None else f"{found.usd:,.2f} USD"
    return f"on {machine.name}: {energy}, {money} (prices of {dated})"
