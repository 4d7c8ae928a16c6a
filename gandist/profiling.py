"""Where the time of a training step goes: a trace, and a page that sums it up."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

UNPROFILED, WARM_UP = 10, 2  # steps before: the first ones compile and allocate
PARTS = ("waiting for data", "discriminator update", "generator update")  # as the trainer marks them


class StepProfiler:
    """Of `steps` steps of this rank, or none: `trace.json.gz`, for ui.perfetto.dev, and `summary.txt` in `folder`."""

    def __init__(self, folder: Path, steps: int, device: torch.device):
        self.folder = folder
        self.steps = steps
        on_gpu = device.type == "cuda"
        self.sort_by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        self._profile = None
        if steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
            plan = schedule(wait=UNPROFILED, warmup=WARM_UP, active=steps, repeat=1)
            self._profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write)

    def __enter__(self) -> "StepProfiler":
        if self._profile:
            self._profile.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._profile:
            self._profile.stop()

    def step(self) -> None:
        """After each step."""
        if self._profile:
            self._profile.step()

    def _write(self, profiled: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        profiled.export_chrome_trace(str(self.folder / "trace.json.gz"))
        events = profiled.key_averages()
        milliseconds = {event.key: event.cpu_time_total / self.steps / 1000 for event in events if event.key in PARTS}
        lines = [f"{self.steps} steps of rank 0, ms a step", *(f"{part:<24}{milliseconds.get(part, 0):9.2f}" for part in PARTS)]
        table = events.table(sort_by=self.sort_by, row_limit=25, max_name_column_width=60)
        (self.folder / "summary.txt").write_text("\n".join(lines) + f"\n\n{table}\n")
        print(f"profile: {self.folder}/summary.txt and trace.json.gz", flush=True)
