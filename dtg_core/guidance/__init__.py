"""Dense teacher guidance, one file per idea of the paper; the functions take and return tensors."""
from dtg_core.guidance.clustering import cluster_nms, select_candidates
from dtg_core.guidance.correspondence import anchor_level, best_anchor, correspond
from dtg_core.guidance.inverse_nms import inverse_nms
from dtg_core.guidance.paradigms import teach
from dtg_core.guidance.rank_matching import rank_matching
from dtg_core.guidance.sparse import pseudo_labels

__all__ = [
    "anchor_level", "best_anchor", "cluster_nms", "correspond", "inverse_nms", "pseudo_labels", "rank_matching",
    "select_candidates", "teach",
]
