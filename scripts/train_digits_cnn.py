"""Make the digits evaluator: its CNN's weights and the reference it compares samples with.

    python scripts/train_digits_cnn.py        # half a minute; rewrites two files in diffussm/evaluation

The network sees the training split only. The held-out split is stored with the reference, as the
"real against real" row of every table.
"""

import numpy as np
import safetensors.torch
import torch
from torch.nn.functional import cross_entropy

from diffussm.data.images import Digits
from diffussm.evaluation.features import DIGITS_WEIGHTS, DigitsCNN
from diffussm.evaluation.statistics import FeatureStatistics

EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 100, 64, 1e-3, 1e-2


def train(data: Digits) -> DigitsCNN:
    torch.manual_seed(0)
    network = DigitsCNN()
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(data)).split(BATCH_SIZE):
            optimizer.zero_grad()
            cross_entropy(network(data.images[batch]).logits, data.labels[batch]).backward()
            optimizer.step()
    return network.eval()


def main() -> None:
    train_data, held_out = Digits("train"), Digits("held_out")
    network = train(train_data)
    DIGITS_WEIGHTS.write_bytes(safetensors.torch.save(network.state_dict()))
    with torch.no_grad():
        features = network(train_data.images)
        accuracy = (network(held_out.images).logits.argmax(dim=1) == held_out.labels).float().mean()
    arrays = {}
    for suffix, values in (("", features.pool), ("_s", features.spatial)):
        statistics = FeatureStatistics(values.shape[1])
        statistics.update(values)
        arrays[f"mu{suffix}"] = statistics.mean.numpy()
        arrays[f"sigma{suffix}"] = statistics.covariance.numpy()
    np.savez_compressed(
        DIGITS_WEIGHTS.with_name("digits_reference.npz"),
        arr_0=train_data.images.permute(0, 2, 3, 1).numpy(),
        held_out=held_out.images.permute(0, 2, 3, 1).numpy(),
        held_out_labels=held_out.labels.numpy(),
        preprocessing="scikit-learn digits, value * 255 / 16 rounded",
        **arrays,
    )
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters, held-out accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
