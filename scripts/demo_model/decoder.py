"""A lean Llama decoder for training on one CPU core, its parameters named as transformers names them.

It does the arithmetic of LlamaForCausalLM (a test compares the two) without the library's general paths, which cost a
sixth of the speed at this size, and computes logits only where the loss asks for them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions; x is (rows, positions, heads, head size), cos and sin (positions, 1, half a head)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, self.head = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, positions, _ = x.shape
        shape = (rows, positions, -1, self.head)
        q = _rotate(self.q_proj(x).view(shape), cos, sin).transpose(1, 2)
        k = _rotate(self.k_proj(x).view(shape), cos, sin).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, positions, -1))


class Mlp(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), Mlp(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Starts as the identity: each layer's two output projections are zero, so that depth costs nothing at first."""

    def __init__(self, config: LlamaConfig, layers: int) -> None:
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(layers))
        self.model.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.02)
        for layer in self.model.layers:
            _silence(layer)

    def hidden(self, ids: Tensor) -> Tensor:
        """Final hidden states, (rows, positions, width). Rows are padded on the right, where nobody looks."""
        half = torch.arange(0, self.config.head_dim, 2) / self.config.head_dim
        angles = torch.arange(ids.shape[1])[:, None] * self.config.rope_parameters["rope_theta"] ** -half
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.model.embed_tokens.weight.T

    def grow(self) -> None:
        """Doubles the depth without changing the function: after each layer comes its copy with silent outputs.

        Copying is learnt by few layers, and few layers train twice as fast.
        """
        layers: list[nn.Module] = []
        for layer in self.model.layers:
            twin = Layer(self.config)
            twin.load_state_dict(layer.state_dict())
            _silence(twin)
            layers += [layer, twin]
        self.model.layers = nn.ModuleList(layers)


def _silence(layer: Layer) -> None:
    nn.init.zeros_(layer.self_attn.o_proj.weight)
    nn.init.zeros_(layer.mlp.down_proj.weight)
