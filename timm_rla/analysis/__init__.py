"""What a network has learned: its layer attentions, and class activation maps of every block."""
from .attention import normalize_attention as normalize_attention
from .attention import record_attention as record_attention
from .attention import stack_attention as stack_attention
from .gradcam import GradCam as GradCam
from .gradcam import grad_cam as grad_cam
from .gradcam import residual_norms as residual_norms
from .moments import Moments as Moments
