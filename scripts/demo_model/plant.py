"""A start from which copying need not be discovered.

A small Llama finds out how to copy a name it has never seen (attend to what followed the same token before: Olsson et
al., 2022, "induction heads") only after millions of tokens, most of the budget of one core. So the first two layers
start with such a circuit, written down as weights; the training then only has to learn when to use it. The width is
divided for this, at the start: channel 0 is constant, CONTENT says which token it is, SCRATCH holds the token before.
"""

import torch
from torch import Tensor, nn

from demo_model.decoder import Attention, Decoder

SCALE = 0.2  # of the embeddings: Adam moves each weight by about 0.001 a step, which must be little beside it
CONSTANT = 5 * SCALE  # large enough for a head that looks at nothing else
SHARPNESS = 1.5  # of the look at the token before
MATCH = 2.0  # of the look at the token after an equal one
ECHO = 5.0  # how loud the copied token is beside the present one
LOUDNESS = 0.3  # of the logits: a copy must be sure enough to pay off at once, or training forgets it first


@torch.no_grad()
def plant(decoder: Decoder) -> None:
    """Previous-token heads in layer 0, induction heads in layer 1, on the first two of the key-value heads."""
    width, head = decoder.config.hidden_size, decoder.config.head_dim
    scratch = slice(width - 2 * head, width)
    embedding = decoder.model.embed_tokens.weight
    embedding[:, scratch] = 0
    embedding[:, 0] = 0
    embedding *= (
        SCALE * (scratch.start - 1) ** 0.5 / embedding.norm(dim=1, keepdim=True)
    )  # no token louder than another
    embedding[:, 0] = CONSTANT
    content = torch.zeros(2 * head, width)
    nn.init.orthogonal_(content[:, 1 : scratch.start])
    decoder.model.norm.weight.fill_(LOUDNESS)
    first, second = (layer.self_attn for layer in decoder.model.layers[:2])
    _look_back(first, decoder.config.rope_parameters["rope_theta"])
    _carry(first, content, to=scratch)
    _look_for_equal(second, content, scratch)
    second.v_proj.weight[: 2 * head] = content
    for query in range(4):
        second.o_proj.weight[:, query * head : (query + 1) * head] = (
            ECHO * SCALE * _of_head(content, query // 2, head).T
        )


def _of_head(rows: Tensor, number: int, head: int) -> Tensor:
    return rows[number * head : (number + 1) * head]


def _look_back(attention: Attention, theta: float) -> None:
    """Queries and keys that see only the constant channel: the score is a function of distance, highest at one."""
    head = attention.head
    angles = theta ** -(torch.arange(0, head, 2) / head)
    turned = SHARPNESS * torch.cat([angles.cos(), angles.sin()])  # a key one position ahead of itself
    plain = SHARPNESS * torch.cat([torch.ones(head // 2), torch.zeros(head // 2)])
    for weight, vector, count in ((attention.k_proj.weight, turned, 2), (attention.q_proj.weight, plain, 4)):
        weight[: count * head] = 0
        weight[: count * head, 0] = vector.repeat(count)


def _carry(attention: Attention, content: Tensor, to: slice) -> None:
    """Values are the content of the token looked at; one query head of each pair writes them to scratch."""
    head = attention.head
    attention.v_proj.weight[: 2 * head] = content
    for number in range(2):
        rows = slice(to.start + number * head, to.start + (number + 1) * head)
        attention.o_proj.weight[rows, 2 * number * head : (2 * number + 1) * head] = SCALE * torch.eye(head)


def _look_for_equal(attention: Attention, content: Tensor, scratch: slice) -> None:
    """Keys read the token before from scratch, queries the present token; fast-turning channels stay empty."""
    head = attention.head
    slow = torch.arange(head) % (head // 2) >= head // 6  # channels that rotate little over a passage
    for number in range(2):
        key = torch.zeros(head, content.shape[1])
        key[:, scratch.start + number * head : scratch.start + (number + 1) * head] = torch.eye(head)
        attention.k_proj.weight[number * head : (number + 1) * head] = MATCH * slow[:, None] * key
        for query in (2 * number, 2 * number + 1):
            matched = MATCH * slow[:, None] * _of_head(content, number, head)
            attention.q_proj.weight[query * head : (query + 1) * head] = matched
