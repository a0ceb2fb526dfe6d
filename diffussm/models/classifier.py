"""NoisyClassifier: p(y | x_t) of noisy latents, as ADM's classifier guidance needs it, without attention.

It is DiffuSSM (in the `figure` reading) told t alone, whose last layer decodes every token to a vote on the class:

    NoisyClassifier     to_tokens, embed -> run_blocks: N x DiffuSSMBlock -> FinalLayer -> mean over tokens

As the last layer is linear, the mean of the votes is the vote of the mean token.
"""

from functools import partial
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from diffussm.models.diffussm import (
    DiffuSSMBlock,
    FinalLayer,
    Positions,
    TokenOrder,
    make_blocks,
    require_options,
    run_blocks,
    to_tokens,
)
from diffussm.models.layers import TimestepEmbedder, linear, require_positive, sincos_positions
from diffussm.models.ssm import S4D, Discretization, Init


class NoisyClassifier(nn.Module):
    """The logits of log p(y | x_t), differentiable in x_t; all classes are equally likely at first.

    Args:
        in_channels: latent channels C.
        num_classes: classes K, y in 0..K-1.
        hidden_size: width D; divisible by `hourglass_ratio`.
        depth: number of blocks.
        hourglass_ratio: M, by which the dense layers shorten the sequence; L must be divisible by it.
        patch_size: side of the square of latent pixels that makes a token.
        bidirectional: whether each block also runs a state-space model from the last token to the first.
        token_order, positions: of the tokens, see `DiffuSSM`; without positions all that tells a token's place
            is how far the state-space models see to either side.
        d_state, init, discretization, dt_min, dt_max, learn_B: the state-space layers, see `S4D`.
        activation_checkpointing: in training, keep only each block's input and compute the block twice.
    """

    made_for_data: ClassVar[tuple[str, ...]] = ("final_layer.linear.",)

    def __init__(
        self,
        in_channels: int = 4,
        num_classes: int = 1000,
        hidden_size: int = 384,
        depth: int = 13,
        hourglass_ratio: int = 2,
        patch_size: int = 1,
        bidirectional: bool = True,
        token_order: TokenOrder = "raster",
        positions: Positions = "sincos",
        d_state: int = 64,
        init: Init = "lin",
        discretization: Discretization = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        learn_B: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        require_positive(in_channels=in_channels)
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: must be at least 2, or there is nothing to tell apart")
        require_options(hidden_size, depth, hourglass_ratio, patch_size, token_order, positions)
        self.in_channels, self.num_classes = in_channels, num_classes
        self.hourglass_ratio, self.patch_size = hourglass_ratio, patch_size
        self.token_order, self.positions = token_order, positions
        self.activation_checkpointing = activation_checkpointing

        self.x_embedder = linear(in_channels * patch_size**2, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        ssm = partial(S4D, hidden_size, d_state, bidirectional, init, discretization, dt_min, dt_max, learn_B)
        self.blocks = make_blocks(hidden_size, depth, hourglass_ratio, ssm)
        for block in self.blocks:
            assert isinstance(block, DiffuSSMBlock)
            # With gates of 0, as in a denoiser, the zero last layer would see of x_t but single pixels: a saddle.
            nn.init.ones_(block.adaLN_modulation.bias.data[2 * hidden_size :])
        self.final_layer = FinalLayer(hidden_size, num_classes)

    def forward(
        self, x_t: Float[Tensor, "B C H W"], t: Int[Tensor, "B"] | Float[Tensor, "B"]
    ) -> Float[Tensor, "B K"]:
        """The logits for `x_t` at timesteps `t`, in the units of training (0 .. T-1)."""
        c = self.t_embedder(t)  # (B, D)
        tokens, grid = to_tokens(x_t, self.patch_size, self.hourglass_ratio)
        x = self.x_embedder(tokens).to(x_t.dtype)  # (B, L, D); under autocast the residual stream stays fp32
        if self.positions == "sincos":
            x = x + sincos_positions(x.shape[-1], *grid, x.device).to(x)
        recompute = self.activation_checkpointing and self.training
        x = run_blocks(self.blocks, x, c, grid, self.token_order, recompute=recompute)
        return self.final_layer(x, c).mean(dim=1)  # (B, L, K) -> (B, K)
