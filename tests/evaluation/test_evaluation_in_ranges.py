"""An evaluation counts every image once and ends in the same numbers, whoever measures it in whatever batches."""

import itertools
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_comparison import Pixels, pixels

from diffussm.evaluation.evaluator import Evaluation
from diffussm.evaluation.streams import StoredStream
from diffussm.runtime.distributed import Interrupted, Processes
from diffussm.runtime.errors import RunDirectoryError
from diffussm.runtime.launch import Place
from diffussm.runtime.work_list import WorkList

CPU = torch.device("cpu")
WANTED = ("fid", "sfid", "is")


class Stored:
    """Images in memory that count how often each was looked at."""

    def __init__(self, images):
        self.images, self.times = images, [0] * len(images)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.times[index] += 1
        return self.images[index], -1


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "pixels.npz"
    np.savez(path, arr_0=pixels(50, seed=1).permute(0, 2, 3, 1).numpy())
    return lambda count: Evaluation(Pixels(), path, num_samples=count, k=1)


def evaluate(evaluation, images, path, ranks=1, batch_size=32, range_size=256, stop=lambda: False):
    """What the first of so many processes, which are threads here, finds; raises what one of them raises."""
    store, results, errors = dist.HashStore(), [None] * ranks, []

    def process(rank):
        processes = Processes(Place(rank, ranks))
        processes._store = store
        work = WorkList(path, len(images), range_size, ".safetensors")
        try:
            work.open("these images", processes)
            undertaking = processes.undertake(stop)
            stream = StoredStream(images, batch_size)
            results[rank] = evaluation.run(stream, work, undertaking, CPU, wanted=WANTED)
        except BaseException as error:
            errors.append(error)
        finally:
            work.close()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert results[1:] == [{}] * (ranks - 1)
    return results[0]


@pytest.mark.fault("G18")
@pytest.mark.parametrize("count", [7, 100, 5003])
def test_counts_are_exact_and_fid_is_the_same_for_any_batch_and_number_of_processes(make, tmp_path, figure, count):
    evaluation, found = make(count), []
    for ranks, batch_size in itertools.product((1, 2, 3), (1, 32, 64)):
        images = Stored(pixels(count))
        path = tmp_path / f"{ranks}-{batch_size}"
        found.append(evaluate(evaluation, images, path, ranks, batch_size, range_size=max(count // 5, 2)))
        assert images.times == [1] * count
    assert all(metrics["num_samples"] == count for metrics in found)
    spread = max(abs(metrics["FID-pixels"] - found[0]["FID-pixels"]) for metrics in found)
    figure(f"N = {count:,}: counts exact in {len(found)} ways, FID off by {spread:.1g}", "1e-6")
    for metrics in found:
        assert metrics["FID-pixels"] == found[0]["FID-pixels"] and metrics["IS"] == found[0]["IS"]
    whole = evaluation.comparison
    one = whole.observe(StoredStream(Stored(pixels(count)), 50).batches(range(count)), CPU, WANTED)
    assert found[0]["FID-pixels"] == pytest.approx(whole.compare(one, CPU, WANTED)["FID-pixels"], abs=1e-6)


@pytest.mark.fault("G18")
def test_one_image_is_refused_before_anything_is_measured(make, figure):
    with pytest.raises(ValueError, match="num_samples=1: must be at least 2"):
        make(1)
    figure("N = 1: refused, as no distribution")


def test_a_stop_ends_all_processes_and_nothing_is_measured_twice(make, tmp_path):
    evaluation, images = make(400), Stored(pixels(400))
    stop = lambda: sum(images.times) > 150  # noqa: E731
    with pytest.raises(Interrupted):
        evaluate(evaluation, images, tmp_path / "work", ranks=2, range_size=20, stop=stop)
    done = sum(images.times)
    assert 150 < done < 400
    metrics = evaluate(evaluation, images, tmp_path / "work", ranks=3, range_size=99)  # it stays at 20
    assert images.times == [1] * 400 and metrics["num_samples"] == 400
    again = evaluate(evaluation, images, tmp_path / "work")
    assert images.times == [1] * 400 and "images_per_second" not in again
    del metrics["images_per_second"]
    assert again == metrics


def test_work_of_another_kind_is_thrown_away_and_of_another_owner_left_alone(tmp_path):
    processes, path = Processes(), tmp_path / "work"
    work = WorkList(path, 10, 4, ".txt")
    work.open("mine", processes)
    assert [work.indices(number) for number in range(len(work))] == [range(4), range(4, 8), range(8, 10)]
    work.file(1).write_text("done")
    with pytest.raises(RunDirectoryError, match="another process is using it"):
        WorkList(path, 10, 4, ".txt").open("mine", processes)
    work.close()
    for identity, count, missing in (("mine", 10, [0, 2]), ("mine", 9, [0, 1, 2]), ("other", 9, [0, 1, 2])):
        work = WorkList(path, count, 4, ".txt")
        work.open(identity, processes)
        assert work.missing() == missing
        work.close()
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunDirectoryError, match="exists and is not ours"):
        WorkList(tmp_path, 10, 4, ".txt").open("mine", processes)
    assert (tmp_path / "thesis.tex").exists()
