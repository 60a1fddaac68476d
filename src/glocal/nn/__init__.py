"""Layers with learned weights, one file a mechanism or a close family; all fill in one frame, `Attention`."""

from glocal.nn.additive import ContextGate, ConvAdditiveAttention
from glocal.nn.agent import AgentAttention, AgentBias, AgentState, agent_attend, causal_agents
from glocal.nn.aha import AllOrHereAttention, gate_rate
from glocal.nn.alignment import AdditiveAttention, Alignment, AlignmentAttention, aligned_softmax
from glocal.nn.asa import LatentSparseAttention, asa_layers
from glocal.nn.block import MLP, Block, DropPath, GatedGELU, SwiGLU
from glocal.nn.block_sparse import BlockSparseAttention
from glocal.nn.concentration import LinearGlobalAttention, clamped_linear_attend
from glocal.nn.conv import BatchNorm, ConvMLP, Depthwise, LocalInteraction
from glocal.nn.conv_attention import ConvAttention, MSAConv, conv_attend
from glocal.nn.core_context import CoreContextAttention
from glocal.nn.descriptor import DescriptorAttention, choose_keyframes
from glocal.nn.dma import DynamicMaskAttention
from glocal.nn.efficient import EfficientAttention, context_maps, efficient_attention
from glocal.nn.factorised import FactorizedAttention
from glocal.nn.frame import USES, Attention, Call
from glocal.nn.gaussian import GaussianAdaptiveAttention, GaussianBlock, importance_factor
from glocal.nn.grouped_linear import GroupedLinear
from glocal.nn.heavy import HeavyHitterAttention
from glocal.nn.hyena import Hyena, HyenaPixel
from glocal.nn.lass import LASS
from glocal.nn.latent import LatentAttention
from glocal.nn.less_is_more import LessIsMore, select_tokens, unified_topk
from glocal.nn.linear import LinearAttention
from glocal.nn.longt5 import LongT5Attention
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
from glocal.nn.rope import Rope
from glocal.nn.score_functions import SCORE_FUNCTIONS, ScoreFunction, entmax15, score_function, sparsemax
from glocal.nn.shifted import ShiftedSparseAttention
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
    "AllOrHereAttention",
    "Attention",
    "BatchNorm",
    "Block",
    "BlockSparseAttention",
    "Call",
    "CausalMultiHeadLinearAttention",
    "ContextGate",
    "ConvAdditiveAttention",
    "ConvAttention",
    "ConvMLP",
    "CoreContextAttention",
    "CrossScan",
    "Depthwise",
    "DescriptorAttention",
    "DropPath",
    "DynamicMaskAttention",
    "EfficientAttention",
    "Expanding",
    "FactorizedAttention",
    "FastmaxAttention",
    "GatedGELU",
    "GaussianAdaptiveAttention",
    "GaussianBlock",
    "GroupedLinear",
    "HeavyHitterAttention",
    "Hyena",
    "HyenaPixel",
    "LatentAttention",
    "LatentSparseAttention",
    "LessIsMore",
    "LinearAttention",
    "LinearGlobalAttention",
    "LocalInteraction",
    "LongT5Attention",
    "LuongAttention",
    "MSAConv",
    "MagnitudeAwareAttention",
    "Matching",
    "MixtureOfBlocksAttention",
    "MixtureOfHeadsAttention",
    "MultiHeadLinearAttention",
    "MultiHopAttention",
    "MultiScaleWindowAttention",
    "MultiWindowAttention",
    "MultipoleAttention",
    "NativeSparseAttention",
    "NeighborhoodAttention",
    "NeuralAttentionSearch",
    "PathDecay",
    "Phase",
    "PolylineAttention",
    "PolylineLinearAttention",
    "PrefixGlobalAttention",
    "Rope",
    "ScoreFunction",
    "ShiftedSparseAttention",
    "SlidingWindowAttention",
    "StripAttention",
    "SwiGLU",
    "UnidirectionalBlockAttention",
    "agent_attend",
    "aligned_softmax",
    "asa_layers",
    "beta_binomial",
    "causal_agents",
    "causal_multi_head_linear",
    "choose_keyframes",
    "clamped_linear_attend",
    "context_maps",
    "conv_attend",
    "dynamic_conv",
    "efficient_attention",
    "entmax15",
    "expanding_attention",
    "fastmax",
    "gate_rate",
    "head_balance",
    "hopfield_retrieve",
    "importance_factor",
    "magnitude_aware",
    "marginal_attention",
    "marginals",
    "match_tokens",
    "mixing_matrix",
    "multi_head_linear",
    "multipole_levels",
    "path_mask",
    "polyline_linear_attend",
    "polyline_mask",
    "polyline_product",
    "score_function",
    "select_tokens",
    "slot_step",
    "sparsemax",
    "taylor_features",
    "unified_topk",
]
