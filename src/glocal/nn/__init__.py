"""Layers with learned weights, one file a mechanism or a close family; all fill in one frame, `Attention`."""

from glocal.nn.additive import ContextGate, ConvAdditiveAttention
from glocal.nn.agent import AgentAttention, AgentBias, AgentState, agent_attend, causal_agents
from glocal.nn.aha import AllOrHereAttention, gate_rate
from glocal.nn.alignment import AdditiveAttention, Alignment, AlignmentAttention, aligned_softmax
from glocal.nn.asa import LatentSparseAttention, asa_layers
from glocal.nn.attention_lora import AttentionLoRA, adapters, add_adapters, remove_adapters, streaming
from glocal.nn.block import MLP, Block, DropPath, GatedGELU, SwiGLU
from glocal.nn.block_sparse import BlockSparseAttention
from glocal.nn.broadcast import ContextBroadcast, UniformHeadAttention, insert_broadcast
from glocal.nn.concentration import LinearGlobalAttention, clamped_linear_attend
from glocal.nn.conv import BatchNorm, ConvMLP, Depthwise, LocalInteraction
from glocal.nn.conv_attention import ConvAttention, MSAConv, conv_attend
from glocal.nn.convolved_scores import multi_token_attend
from glocal.nn.core_context import CoreContextAttention
from glocal.nn.decay import no_weight_decay
from glocal.nn.delta_conv import DeltaConv
from glocal.nn.descriptor import DescriptorAttention, choose_keyframes
from glocal.nn.dma import DynamicMaskAttention
from glocal.nn.efficient import EfficientAttention, context_maps, efficient_attention
from glocal.nn.factorised import FactorizedAttention
from glocal.nn.frame import USES, Attention, Call
from glocal.nn.gaussian import GaussianAdaptiveAttention, GaussianBlock, importance_factor
from glocal.nn.graph_attention import GraphAttention, cosine_edges, edge_softmax
from glocal.nn.grouped_linear import GroupedLinear
from glocal.nn.head_embedding import HeadEmbeddingAttention
from glocal.nn.heavy import HeavyHitterAttention
from glocal.nn.hyena import Hyena, HyenaPixel
from glocal.nn.knocking import KnockingHeadsAttention
from glocal.nn.lass import LASS
from glocal.nn.latent import LatentAttention
from glocal.nn.latent_monotonic import LatentMonotonicAttention, linear_alignment, suffix_log_softmax
from glocal.nn.latent_search import AlignmentStore, Hypothesis, SearchDecoder, align_tokens, recognise_tokens
from glocal.nn.less_is_more import LessIsMore, select_tokens, unified_topk
from glocal.nn.linear import LinearAttention
from glocal.nn.location_relative import DynamicConvolutionAttention, GMMAttention, beta_binomial
from glocal.nn.longt5 import LongT5Attention
from glocal.nn.low_rank import LowRankAttention, hard_attend, low_rank_attention
from glocal.nn.luong import LuongAttention
from glocal.nn.mala import MagnitudeAwareAttention, magnitude_aware
from glocal.nn.marginal import (
    STRUCTURES,
    Expanding,
    MultiHopAttention,
    expanding_attention,
    hopfield_retrieve,
    marginal_attention,
    marginals,
    slot_step,
)
from glocal.nn.merging import AgentSD, Matching, Phase, match_tokens
from glocal.nn.mhla import MultiHeadLinearAttention, mixing_matrix, multi_head_linear
from glocal.nn.mhla_causal import CausalMultiHeadLinearAttention, causal_multi_head_linear
from glocal.nn.mixture_of_heads import MixtureOfHeadsAttention, head_balance
from glocal.nn.moba import MixtureOfBlocksAttention
from glocal.nn.monotonic_paths import best_path, log_marginal
from glocal.nn.multi_token import MultiTokenAttention
from glocal.nn.multipole import MultipoleAttention, multipole_levels
from glocal.nn.multiwindow import MultiWindowAttention
from glocal.nn.nats import NeuralAttentionSearch
from glocal.nn.neighborhood import NeighborhoodAttention
from glocal.nn.nsa import NativeSparseAttention
from glocal.nn.polyline import (
    PathDecay,
    PolylineAttention,
    PolylineLinearAttention,
    path_mask,
    polyline_linear_attend,
    polyline_mask,
    polyline_product,
)
from glocal.nn.prefix import PrefixGlobalAttention
from glocal.nn.reduced import OptimisedAttention, SliceAttention, SuperAttention
from glocal.nn.repast import RelativePoseAttention
from glocal.nn.rope import Rope
from glocal.nn.score_functions import SCORE_FUNCTIONS, ScoreFunction, entmax15, score_function, sparsemax
from glocal.nn.shifted import ShiftedSparseAttention
from glocal.nn.span_conv import SpanConvAttention, dynamic_conv
from glocal.nn.sparse_activation import TopKActivation, insert_top_k
from glocal.nn.ss2d import SS2D, CrossScan
from glocal.nn.strip import StripAttention
from glocal.nn.taylor import FastmaxAttention, fastmax, taylor_features
from glocal.nn.uniba import UnidirectionalBlockAttention
from glocal.nn.window import MultiScaleWindowAttention, SlidingWindowAttention

__all__ = [
    "LASS",
    "MLP",
    "SCORE_FUNCTIONS",
    "SS2D",
    "STRUCTURES",
    "USES",
    "AdditiveAttention",
    "AgentAttention",
    "AgentBias",
    "AgentSD",
    "AgentState",
    "Alignment",
    "AlignmentAttention",
    "AlignmentStore",
    "AllOrHereAttention",
    "Attention",
    "AttentionLoRA",
    "BatchNorm",
    "Block",
    "BlockSparseAttention",
    "Call",
    "CausalMultiHeadLinearAttention",
    "ContextBroadcast",
    "ContextGate",
    "ConvAdditiveAttention",
    "ConvAttention",
    "ConvMLP",
    "CoreContextAttention",
    "CrossScan",
    "DeltaConv",
    "Depthwise",
    "DescriptorAttention",
    "DropPath",
    "DynamicConvolutionAttention",
    "DynamicMaskAttention",
    "EfficientAttention",
    "Expanding",
    "FactorizedAttention",
    "FastmaxAttention",
    "GMMAttention",
    "GatedGELU",
    "GaussianAdaptiveAttention",
    "GaussianBlock",
    "GraphAttention",
    "GroupedLinear",
    "HeadEmbeddingAttention",
    "HeavyHitterAttention",
    "Hyena",
    "HyenaPixel",
    "Hypothesis",
    "KnockingHeadsAttention",
    "LatentAttention",
    "LatentMonotonicAttention",
    "LatentSparseAttention",
    "LessIsMore",
    "LinearAttention",
    "LinearGlobalAttention",
    "LocalInteraction",
    "LongT5Attention",
    "LowRankAttention",
    "LuongAttention",
    "MSAConv",
    "MagnitudeAwareAttention",
    "Matching",
    "MixtureOfBlocksAttention",
    "MixtureOfHeadsAttention",
    "MultiHeadLinearAttention",
    "MultiHopAttention",
    "MultiScaleWindowAttention",
    "MultiTokenAttention",
    "MultiWindowAttention",
    "MultipoleAttention",
    "NativeSparseAttention",
    "NeighborhoodAttention",
    "NeuralAttentionSearch",
    "OptimisedAttention",
    "PathDecay",
    "Phase",
    "PolylineAttention",
    "PolylineLinearAttention",
    "PrefixGlobalAttention",
    "RelativePoseAttention",
    "Rope",
    "ScoreFunction",
    "SearchDecoder",
    "ShiftedSparseAttention",
    "SliceAttention",
    "SlidingWindowAttention",
    "SpanConvAttention",
    "StripAttention",
    "SuperAttention",
    "SwiGLU",
    "TopKActivation",
    "UnidirectionalBlockAttention",
    "UniformHeadAttention",
    "adapters",
    "add_adapters",
    "agent_attend",
    "align_tokens",
    "aligned_softmax",
    "asa_layers",
    "best_path",
    "beta_binomial",
    "causal_agents",
    "causal_multi_head_linear",
    "choose_keyframes",
    "clamped_linear_attend",
    "context_maps",
    "conv_attend",
    "cosine_edges",
    "dynamic_conv",
    "edge_softmax",
    "efficient_attention",
    "entmax15",
    "expanding_attention",
    "fastmax",
    "gate_rate",
    "hard_attend",
    "head_balance",
    "hopfield_retrieve",
    "importance_factor",
    "insert_broadcast",
    "insert_top_k",
    "linear_alignment",
    "log_marginal",
    "low_rank_attention",
    "magnitude_aware",
    "marginal_attention",
    "marginals",
    "match_tokens",
    "mixing_matrix",
    "multi_head_linear",
    "multi_token_attend",
    "multipole_levels",
    "no_weight_decay",
    "path_mask",
    "polyline_linear_attend",
    "polyline_mask",
    "polyline_product",
    "recognise_tokens",
    "remove_adapters",
    "score_function",
    "select_tokens",
    "slot_step",
    "sparsemax",
    "streaming",
    "suffix_log_softmax",
    "taylor_features",
    "unified_topk",
]
