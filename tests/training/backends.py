"""Loggers that misbehave, for the processes that relays start."""

import os
import time
from pathlib import Path


class Faithful:
    """Writes down what it is told."""

    def start(self, directory, name, images, config):
        self.file = Path(directory) / "told.txt"
        self.tell("start", name, images, len(config))

    def write(self, images, values):
        self.tell("write", images, *sorted(values.items()))

    def show(self, images, name, picture):
        self.tell("show", images, name, Path(picture).name)

    def close(self):
        self.tell("close")

    def tell(self, *what):
        with self.file.open("a") as file:
            print(*what, file=file)


class Raising(Faithful):
    """Fails at every record."""

    def write(self, images, values):
        raise RuntimeError("no such server\nand more")


class NeverStarting(Faithful):
    """Fails at once."""

    def start(self, directory, name, images, config):
        raise RuntimeError("no licence")


class Hanging(Faithful):
    """Never returns, and listens to nobody."""

    def write(self, images, values):
        time.sleep(10_000)


class HangingAtTheEnd(Faithful):
    """Takes every record, and then never ends."""

    def close(self):
        time.sleep(10_000)


class Slow(Faithful):
    """Takes its time."""

    def write(self, images, values):
        time.sleep(0.05)
        super().write(images, values)


class Dying(Faithful):
    """Takes its process with it."""

    def write(self, images, values):
        os._exit(11)


class Chatty(Faithful):
    """Prints a lot, and has a remark."""

    def start(self, directory, name, images, config):
        super().start(directory, name, images, config)
        print("chatter")
        return "all is well"
