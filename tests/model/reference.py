"""The Vision Transformer spelled out: q, k, v apart, attention as matrix products. What ours must equal."""

import math

import torch
from einops import rearrange
from torch import nn


class MHA(nn.Module):
    def __init__(self, hidden_dim, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.scale = torch.sqrt(torch.tensor(hidden_dim / n_heads))
        self.fc_q = nn.Linear(hidden_dim, hidden_dim)
        self.fc_k = nn.Linear(hidden_dim, hidden_dim)
        self.fc_v = nn.Linear(hidden_dim, hidden_dim)
        self.fc_o = nn.Linear(hidden_dim, hidden_dim)
        # Weight initialization
        nn.init.xavier_uniform_(self.fc_q.weight)
        nn.init.xavier_uniform_(self.fc_k.weight)
        nn.init.xavier_uniform_(self.fc_v.weight)
        nn.init.xavier_uniform_(self.fc_o.weight)
        if self.fc_q.bias is not None:
            nn.init.constant_(self.fc_q.bias, 0)
        if self.fc_k.bias is not None:
            nn.init.constant_(self.fc_k.bias, 0)
        if self.fc_v.bias is not None:
            nn.init.constant_(self.fc_v.bias, 0)
        if self.fc_o.bias is not None:
            nn.init.constant_(self.fc_o.bias, 0)

    def forward(self, x):
        Q = self.fc_q(x)
        K = self.fc_k(x)
        V = self.fc_v(x)

        Q = rearrange(Q, "B W (H D) -> B H W D", H=self.n_heads)
        K = rearrange(K, "B W (H D) -> B H W D", H=self.n_heads)
        V = rearrange(V, "B W (H D) -> B H W D", H=self.n_heads)

        attention_score = Q @ K.permute(0, 1, 3, 2) / self.scale
        attention_weight = torch.softmax(attention_score, dim=-1)
        attention = attention_weight @ V

        x = rearrange(attention, "B H W D -> B W (H D)")
        x = self.fc_o(x)
        return x


class FeedForward(nn.Module):
    def __init__(self, hidden_dim, d_ff, drop_p):
        super().__init__()
        self.linear = nn.Sequential(
            nn.Linear(hidden_dim, d_ff),
            nn.GELU(),
            nn.Dropout(drop_p),
            nn.Linear(d_ff, hidden_dim),
        )

    def forward(self, x):
        x = self.linear(x)
        return x


class EncoderLayer(nn.Module):
    def __init__(self, hidden_dim, d_ff, n_heads, drop_p):
        super().__init__()
        self.self_atten_LN = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.self_atten = MHA(hidden_dim, n_heads)
        self.FF_LN = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.FF = FeedForward(hidden_dim, d_ff, drop_p)
        self.dropout = nn.Dropout(drop_p)

    def forward(self, x):
        residual = self.self_atten_LN(x)
        residual = self.self_atten(residual)
        residual = self.dropout(residual)
        x = x + residual

        residual = self.FF_LN(x)
        residual = self.FF(residual)
        residual = self.dropout(residual)
        x = x + residual
        return x


class Encoder(nn.Module):
    def __init__(self, seq_length, n_layers, hidden_dim, d_ff, n_heads, drop_p):
        super().__init__()
        self.pos_embedding = nn.Parameter(0.02 * torch.randn(seq_length, hidden_dim))
        self.dropout = nn.Dropout(drop_p)
        self.layers = nn.ModuleList([EncoderLayer(hidden_dim, d_ff, n_heads, drop_p) for _ in range(n_layers)])
        self.ln = nn.LayerNorm(hidden_dim, eps=1e-6)

    def forward(self, x):
        x = x + self.pos_embedding.expand_as(x)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x)
        x = x[:, 0, :]
        x = self.ln(x)
        return x


class VisionTransformer(nn.Module):
    def __init__(
        self,
        img_size,
        patch_size,
        n_layers,
        hidden_dim,
        d_ff,
        n_heads,
        representation_size=None,
        drop_p=0.0,
        num_classes=1000,
    ):
        super().__init__()
        self.hidden_dim = hidden_dim

        seq_length = (img_size // patch_size) ** 2 + 1  # +1: the class token

        self.input_embedding = nn.Conv2d(3, hidden_dim, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.zeros(hidden_dim))
        self.encoder = Encoder(seq_length, n_layers, hidden_dim, d_ff, n_heads, drop_p)

        if representation_size is None:  # fine-tuning
            self.head = nn.Linear(hidden_dim, num_classes)
        else:  # pre-training
            self.head = nn.Sequential(
                nn.Linear(hidden_dim, representation_size),
                nn.Tanh(),
                nn.Linear(representation_size, num_classes),
            )

        # Weight initialization
        fan_in = (
            self.input_embedding.in_channels * self.input_embedding.kernel_size[0] * self.input_embedding.kernel_size[1]
        )
        nn.init.trunc_normal_(self.input_embedding.weight, std=math.sqrt(1 / fan_in))
        if self.input_embedding.bias is not None:
            nn.init.zeros_(self.input_embedding.bias)

        if representation_size is None:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        else:
            fan_in = self.head[0].in_features
            nn.init.trunc_normal_(self.head[0].weight, std=math.sqrt(1 / fan_in))
            nn.init.zeros_(self.head[0].bias)

    def forward(self, x):
        x = self.input_embedding(x)
        x = rearrange(x, "B C H W -> B (H W) C")

        batch_class_token = self.class_token.expand(x.shape[0], 1, -1)
        x = torch.cat([batch_class_token, x], dim=1)

        x = self.encoder(x)
        x = self.head(x)
        return x
