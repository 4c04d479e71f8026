"""A trained encoder-decoder with ReLU feed-forwards that numbers antibodies (ANARCII, University of Oxford, BSD-3), in plain
torch, with sequences to try it on.

It reads the residues of an antibody's variable domain and writes, for each, its position in the IMGT numbering.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import assets

PACKAGE = "anarcii==2.0.8"
WEIGHTS = "anarcii/models/antibody/antibody_4_2_128_512.pt"

WIDTH, HEADS, LAYERS, NEURONS, LONGEST, RESIDUES, NUMBERS = 128, 4, 2, 512, 210, 25, 136
PAD, START, END = 0, 1, 2
LETTERS = {letter: index for index, letter in enumerate("ACDEFGHIKLMNPQRSTVWXY", start=4)}
SUBSTITUTES = "ACDEFGHIKLMNPQRSTVWY"

ANTIBODIES = (
    # trastuzumab, adalimumab and rituximab: heavy chain, light chain
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK",
    "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLRAEDTAVYYCAKVSYLSTASSLDYWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCRASQGIRNYLAWYQQKPGKAPKLLIYAASTLQSGVPSRFSGSGSGTDFTLTISSLQPEDVATYYCQRYNRAPYTFGQGTKVEIK",
    "QVQLQQPGAELVKPGASVKMSCKASGYTFTSYNMHWVKQTPGRGLEWIGAIYPGNGDTSYNQKFKGKATLTADKSSSTAYMQLSSLTSEDSAVYYCARSTYYGGDWYFNVWGAGTTVTVSA",
    "QIVLSQSPAILSASPGEKVTMTCRASSSVSYIHWFQQKPGSSPKPWIYATSNLASGVPVRFSGSGSGTSYSLTISRVEAEDAATYYCQQWTSNPPTFGGGTKLEIK",
    # pembrolizumab
    "QVQLVQSGVEVKKPGASVKVSCKASGYTFTNYYMYWVRQAPGQGLEWMGGINPSNGGTNFNEKFKNRVTLTTDSSTTTAYMELKSLQFDDTAVYYCARRDYRFDMGFDYWGQGTTVTVSS",
    "EIVLTQSPATLSLSPGERATLSCRASKGVSTSGYSYLHWYQQKPGQAPRLLIYLASYLESGVPARFSGSGSGTDFTLTISSLEPEDFAVYYCQHSRDLPLTFGGGTKVEIK",
)
SEEN = 6
"""Number of sequences used for calibration; the others are held out."""


class Attention(nn.Module):
    """Attention with the parameter names of torch's MultiheadAttention, so that the trained weights load."""

    def __init__(self) -> None:
        super().__init__()
        self.multihead_attn = nn.ParameterDict()
        self.multihead_attn["in_proj_weight"] = nn.Parameter(torch.empty(3 * WIDTH, WIDTH))
        self.multihead_attn["in_proj_bias"] = nn.Parameter(torch.empty(3 * WIDTH))
        self.multihead_attn.add_module("out_proj", nn.Linear(WIDTH, WIDTH))

    def forward(
        self, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor | None, causal: bool
    ) -> torch.Tensor:
        """x [B, T, D], memory [B, S, D], mask bool[B, 1, 1, S] (True: may be attended) -> [B, T, D]."""
        weights = self.multihead_attn["in_proj_weight"].chunk(3)
        biases = self.multihead_attn["in_proj_bias"].chunk(3)
        q, k, v = (
            nn.functional.linear(item, weight, bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for item, weight, bias in zip((x, memory, memory), weights, biases)
        )
        mixed = scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        out: torch.Tensor = self.multihead_attn.out_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[operator]
        return out


class FeedForward(nn.Module):
    """128 -> 512 -> 128 with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.fc_1, self.fc_2 = nn.Linear(WIDTH, NEURONS), nn.Linear(NEURONS, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc_2(torch.relu(self.fc_1(x)))
        return out


class Layer(nn.Module):
    """One post-norm layer; in a decoder also with cross-attention."""

    def __init__(self, decodes: bool) -> None:
        super().__init__()
        self.self_attention, self.self_attn_layer_norm = Attention(), nn.LayerNorm(WIDTH)
        if decodes:
            self.encoder_attention, self.enc_attn_layer_norm = Attention(), nn.LayerNorm(WIDTH)
        self.positionwise_feedforward, self.ff_layer_norm = FeedForward(), nn.LayerNorm(WIDTH)
        self.decodes = decodes

    def forward(self, x: torch.Tensor, seen: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
        mixed = self.self_attention(x, x, None if self.decodes else seen, self.decodes)
        x = self.self_attn_layer_norm(x + mixed)
        if self.decodes:
            x = self.enc_attn_layer_norm(x + self.encoder_attention(x, memory, seen, False))
        out: torch.Tensor = self.ff_layer_norm(x + self.positionwise_feedforward(x))
        return out


class Stack(nn.Module):
    """The encoder or the decoder."""

    def __init__(self, vocabulary: int, decodes: bool) -> None:
        super().__init__()
        self.tok_embedding, self.pos_embedding = nn.Embedding(vocabulary, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.layers = nn.ModuleList(Layer(decodes) for _ in range(LAYERS))
        if decodes:
            self.fc_out = nn.Linear(WIDTH, vocabulary)

    def forward(
        self, ids: torch.Tensor, seen: torch.Tensor, memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.tok_embedding(ids) * WIDTH**0.5 + self.pos_embedding(positions)
        for layer in self.layers:
            x = layer(x, seen, memory)
        return x if memory is None else self.fc_out(x)


class Numbering(nn.Module):
    """residues i64[B, S], numbers so far i64[B, T] -> logits of the next numbers f[B, T, 136]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Stack(RESIDUES, decodes=False), Stack(NUMBERS, decodes=True)

    def forward(self, residues: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        seen = (residues != PAD)[:, None, None, :]
        out: torch.Tensor = self.decoder(numbers, seen, self.encoder(residues, seen))
        return out


def trained() -> Numbering:
    """The model with its trained weights, fetched from the package index."""
    with assets.wheel(PACKAGE) as archive:
        stored = io.BytesIO(archive.read(WEIGHTS))
    model = Numbering()
    model.load_state_dict(torch.load(stored, weights_only=True, map_location="cpu"))
    return model.eval()


@dataclass(frozen=True)
class Sequences:
    """Residues i64[B, S] and their reference numbering i64[B, T]: the whole model's, for the unchanged antibody."""

    residues: torch.Tensor
    numbering: torch.Tensor

    @property
    def batch(self) -> dict[str, torch.Tensor]:
        """The model's inputs, with all numbers except the last."""
        return {"residues": self.residues, "numbers": self.numbering[:, :-1]}

    def agreement(self, logits: torch.Tensor) -> float:
        """The share of residues that get the reference number."""
        wanted = self.numbering[:, 1:]
        real = torch.arange(wanted.shape[1]) <= (self.residues != PAD).sum(1, keepdim=True) - 2
        return float((logits.argmax(-1) == wanted)[real].double().mean())


def tokens(sequence: str, length: int) -> list[int]:
    """The ids of a sequence, padded to `length`."""
    ids = [START, *(LETTERS[letter] for letter in sequence), END]
    return ids + [PAD] * (length - len(ids))


@torch.no_grad()
def number(model: Numbering, sequences: tuple[str, ...]) -> torch.Tensor:
    """The numbering of whole sequences by greedy decoding, i64[B, T]."""
    length = max(map(len, sequences)) + 2
    residues = torch.tensor([tokens(sequence, length) for sequence in sequences])
    numbers = torch.full((len(sequences), 1), START)
    for _ in range(length):
        numbers = torch.cat([numbers, model(residues, numbers)[:, -1:].argmax(-1)], 1)
    return numbers


def variants(numbering: torch.Tensor, which: range, count: int, seed: int) -> Sequences:
    """`count` variants of each antibody with up to 15% of its residues substituted, which keeps its numbering."""
    rng = random.Random(seed)
    residues, numbers = [], []
    for index in which:
        for _ in range(count):
            letters = list(ANTIBODIES[index])
            changed = rng.sample(range(len(letters)), rng.randrange(len(letters) * 15 // 100))
            for position in changed:
                letters[position] = rng.choice(SUBSTITUTES)
            residues.append(tokens("".join(letters), max(map(len, ANTIBODIES)) + 2))
            numbers.append(numbering[index])
    return Sequences(torch.tensor(residues), torch.stack(numbers))
