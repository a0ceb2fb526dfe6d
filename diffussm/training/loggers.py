"""Where a run can be watched beside metrics.jsonl: TensorBoard, and Weights & Biases.

They live in processes of their own, see `relay`, so they may raise, hang or die. Nothing here imports torch.
"""

import importlib.util
import math
import secrets
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from diffussm.runtime.errors import ConfigError


class Backend(Protocol):
    """Something that shows a run.

    `start` is told where the run lives and how many images it begins with; it may return a remark for a person.
    """

    def start(self, directory: Path, name: str, images: int, config: Mapping[str, Any]) -> str | None: ...
    def write(self, images: int, values: Mapping[str, float]) -> None: ...
    def show(self, images: int, name: str, picture: Path) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/` of the run: `tensorboard --logdir runs`."""

    def __init__(self) -> None:
        require("tensorboard")

    def start(self, directory: Path, name: str, images: int, config: Mapping[str, Any]) -> None:
        """Begin a file, from which on what a killed run showed after its checkpoint is forgotten."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(directory / "tensorboard"))
        begin = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=images + 1, session_log=begin))

    def write(self, images: int, values: Mapping[str, float]) -> None:
        """A scalar for each value."""
        self._add(images, [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()])

    def show(self, images: int, name: str, picture: Path) -> None:
        """The PNG as it is."""
        content = picture.read_bytes()
        width, height = struct.unpack(">II", content[16:24])  # of a PNG's first chunk
        image = self._summary.Image(encoded_image_string=content, width=width, height=height, colorspace=3)
        self._add(images, [self._summary.Value(tag=name, image=image)])

    def close(self) -> None:
        """Write out everything."""
        self._writer.close()

    def _add(self, images: int, values: list[Any]) -> None:
        summary = self._summary(value=values)
        self._writer.add_event(self._event(wall_time=time.time(), step=images, summary=summary))
        self._writer.flush()


class WandB:
    """Weights & Biases: one run there for each run directory, whose id is kept in `wandb/id`.

    Args:
        mode: offline writes files below `wandb/` only, for `wandb sync` later; so does online if it fails.
        init_seconds: how long the server may take to answer at the start.
    """

    def __init__(
        self,
        project: str = "diffussm",
        entity: str | None = None,
        mode: Literal["online", "offline"] = "online",
        init_seconds: float = 60.0,
    ) -> None:
        require("wandb")
        if init_seconds <= 0:
            raise ValueError(f"init_seconds={init_seconds}: must be positive")
        self.project, self.entity, self.mode, self.init_seconds = project, entity, mode, init_seconds

    def start(self, directory: Path, name: str, images: int, config: Mapping[str, Any]) -> str | None:
        """Begin the run there, or continue it; offline if that is refused or takes too long."""
        import wandb

        self._wandb = wandb
        file = directory / "wandb" / "id"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(secrets.token_hex(4))
        options: dict[str, Any] = {
            "project": self.project,
            "entity": self.entity,
            "name": name,
            "id": file.read_text().strip(),
            "resume": "allow",
            "dir": str(directory),
            "config": dict(config),
        }
        settings = wandb.Settings(init_timeout=self.init_seconds, console="off")
        remark = None
        try:
            self._run = wandb.init(mode=self.mode, settings=settings, **options)
        except Exception as error:  # whatever it raises, the run can be watched later
            if self.mode == "offline":
                raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            remark = f"offline ({reason}); later, `wandb sync {directory}/wandb/offline-*` uploads it"
            wandb.teardown()  # or it takes the run for one that somebody else has begun
            self._run = wandb.init(mode="offline", settings=settings, **options)
        # A run that goes back to its checkpoint passes the same images again, which steps of wandb's cannot.
        self._run.define_metric("images")
        self._run.define_metric("*", step_metric="images")
        return remark

    def write(self, images: int, values: Mapping[str, float]) -> None:
        """One row."""
        self._run.log({"images": images, **values})

    def show(self, images: int, name: str, picture: Path) -> None:
        """The picture as an image of the run."""
        self._run.log({"images": images, name: self._wandb.Image(str(picture))})

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


def numbers(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a record by name, those of a nested one as `outer/inner`."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            found[f"{prefix}{key}"] = float(value)
    return found


def require(package: str) -> None:
    """ConfigError unless the package of this name, which is also the extra's, is installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # a directory of that name is no package
        raise ConfigError(f"logger={package}: needs the package {package}: pip install 'diffussm[{package}]'")
