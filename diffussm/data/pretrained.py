"""Weights that others trained, in the files of diffusers: found, identified, and never unpickled.

A model is a folder with config.json and diffusion_pytorch_model.safetensors, here or on the Hugging Face hub.
"""

import json
import re
import threading
import urllib.error
import urllib.request
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from diffussm.runtime.errors import DataError, note
from diffussm.runtime.hashing import hash_file, hash_text

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
PICKLE_FILE = "diffusion_pytorch_model.bin"
NO_ARCHITECTURE = ("scaling_factor", "shift_factor", "force_upcast", "sample_size")  # in config.json
FILES = f"{CONFIG_FILE} and {WEIGHTS_FILE}"
HUB_TIMEOUT_SECONDS = 5
USUAL_SUBFOLDER = "vae"  # of pipelines: presets name it, and a copy of what is in it need not have it
_REPOSITORY = re.compile(r"[\w.\-]+/[\w.\-]+")


class Pretrained:
    """The files of one model, looked for when they are asked for; DataError says what to put where.

    Args:
        key: the configuration's name for `where`, for messages.
        where: a directory, or a repository of the hub, owner/name.
        subfolder: of the directory or repository; in a directory, None and vae stand for itself or its vae/.
        revision: of the repository; None: the newest, or whichever is cached.
        class_name: the class of diffusers that config.json must name.
    """

    def __init__(
        self, key: str, where: str | Path, subfolder: str | None, revision: str | None, class_name: str
    ) -> None:
        self.where, self.subfolder, self.revision = Path(where).expanduser(), subfolder, revision
        self.class_name, self.key, self._said = class_name, key, f"{key}={where}"

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it was written."""
        return self._read_config(self._config_file)

    @cached_property
    def weights(self) -> Path:
        """The file of weights, on this machine, beside its config.json."""
        folder = self._config_file.parent
        if not self.where.is_dir():
            of_config = re.search(r"snapshots/([^/]+)", folder.as_posix())  # as the hub's cache lays them out
            return self._fetch(WEIGHTS_FILE, of_config[1] if of_config else self.revision)
        if index := sorted(folder.glob("*.index.json")):
            raise DataError(
                f"{index[0]}: diffusers would load what it names in the place of {WEIGHTS_FILE}: remove it"
            )
        if (folder / WEIGHTS_FILE).is_file():
            return folder / WEIGHTS_FILE
        if (folder / PICKLE_FILE).is_file():
            raise DataError(
                f"{folder / PICKLE_FILE}: a pickle, which could run code when it is read: put {WEIGHTS_FILE} of "
                "the same model there, or convert it once, in Python: safetensors.torch.save_file(torch.load("
                f"{PICKLE_FILE!r}, weights_only=True), {WEIGHTS_FILE!r})"
            )
        raise DataError(f"{self._said}: no {WEIGHTS_FILE} in {folder}: put it there")

    @property
    def is_here(self) -> bool:
        """Whether both files are on this machine; nothing is fetched."""
        if self.where.is_dir():
            try:
                return bool(self.weights)
            except DataError:
                return False
        return all(self._in_cache(name, self.revision) for name in (CONFIG_FILE, WEIGHTS_FILE))

    @property
    def sha256(self) -> str:
        """Of the file of weights; remembered as long as the file does not change."""
        status = self.weights.stat()
        return _sha256(self.weights, status.st_size, status.st_mtime_ns)

    @property
    def architecture_sha256(self) -> str:
        """Of what config.json says of the network, which the same weights may be run through otherwise."""
        told = {
            key: value
            for key, value in self.config.items()
            if not key.startswith("_") and key not in NO_ARCHITECTURE
        }
        canonical = json.dumps(told, sort_keys=True, separators=(",", ":"))
        return hash_text(canonical)

    @cached_property
    def _config_file(self) -> Path:
        """In a directory, at the first place whose config.json names the class."""
        if not self.where.is_dir():
            return self._fetch(CONFIG_FILE, self.revision)
        if self.subfolder not in (None, USUAL_SUBFOLDER):
            return self._config_file_in(self.where / str(self.subfolder))
        places = [self.where, self.where / USUAL_SUBFOLDER]
        if self.subfolder is not None:
            places.reverse()
        found = [place / CONFIG_FILE for place in places if (place / CONFIG_FILE).is_file()]
        if not found:
            raise DataError(f"{self._said}: no {CONFIG_FILE} there or in {USUAL_SUBFOLDER}/: put {FILES} there")
        return next((file for file in found if self._names_class(file)), found[0])

    def _config_file_in(self, place: Path) -> Path:
        if (place / CONFIG_FILE).is_file():
            return place / CONFIG_FILE
        setting = f"{self.key.rpartition('.')[0]}.subfolder={self.subfolder}"
        others = [one for one in (self.where, self.where / USUAL_SUBFOLDER) if (one / CONFIG_FILE).is_file()]
        remedy = f"set it to null for that of {others[0]}" if others else f"put {FILES} there"
        raise DataError(f"{setting}: no {CONFIG_FILE} in {place}: {remedy}")

    def _names_class(self, file: Path) -> bool:
        try:
            self._read_config(file)
        except DataError:
            return False
        return True

    def _read_config(self, file: Path) -> dict[str, Any]:
        try:
            config = json.loads(file.read_text())
            named = config.get("_class_name")
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{file}: not a configuration of diffusers ({error}): restore it") from error
        if named != self.class_name:
            raise DataError(
                f"{file}: of {named}, not {self.class_name}: set {self.key} to one of {self.class_name}"
            )
        return config

    def _fetch(self, name: str, revision: str | None) -> Path:
        """A file of the repository, from the hub's cache on this machine or from the hub."""
        place = f"put {FILES} into a directory and set {self.key}=DIRECTORY"
        if not _REPOSITORY.fullmatch(str(self.where)):
            raise DataError(f"{self._said}: no such directory: {place}")
        if cached := self._in_cache(name, revision):
            return cached
        import huggingface_hub  # comes with diffusers
        from huggingface_hub.utils import disable_progress_bars

        if huggingface_hub.constants.HF_HUB_OFFLINE or not _answers(huggingface_hub.constants.ENDPOINT):
            raise DataError(f"{self._said}: not found here and the hub cannot be reached: {place}")
        disable_progress_bars()
        note(f"fetching {name} of {self.where} from the hub")
        try:
            return self._look(name, revision, etag_timeout=HUB_TIMEOUT_SECONDS)
        except (OSError, ValueError) as error:
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(
                f"{self._said}: not found here, and the hub gives no {name} ({why}): {place}"
            ) from error

    def _in_cache(self, name: str, revision: str | None) -> Path | None:
        """A file of the repository in the hub's cache, if it is a repository and the file is there."""
        if not _REPOSITORY.fullmatch(str(self.where)):
            return None
        try:
            return self._look(name, revision, local_files_only=True)
        except OSError:
            return None

    def _look(self, name: str, revision: str | None, **options: Any) -> Path:
        import huggingface_hub  # comes with diffusers

        found = huggingface_hub.hf_hub_download(
            str(self.where), name, subfolder=self.subfolder, revision=revision, **options
        )
        return Path(found)


def _answers(url: str) -> bool:
    """Whether a server answers within HUB_TIMEOUT_SECONDS, name resolution and proxies included.

    The hub's own client tries six times over and says so each time.
    """
    heard: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_TIMEOUT_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an answer too
        except (OSError, ValueError):
            return
        heard.append(True)

    asking = threading.Thread(target=ask, daemon=True)  # looking up a name can take longer than any time-out
    asking.start()
    asking.join(HUB_TIMEOUT_SECONDS)
    return bool(heard)


@lru_cache
def _sha256(file: Path, size: int, changed: int) -> str:
    return hash_file(file)
