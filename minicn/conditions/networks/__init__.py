"""Three annotator networks: soft edges (HED), straight lines (M-LSD), people's key points (OpenPose).

They keep the names of the weights released with ControlNet, so these files load: ControlNetHED.pth,
mlsd_large_512_fp32.pth and body_pose_model.pth. They say what is in an image; `conditions` turns that into hints.
All were used on images of about 512 pixels: resize first (the shorter side to 512).
Left out: training, hands and faces, OpenPose at several scales (ControlNet uses one).
"""

from minicn.conditions.networks.bodypose import BodyPose, find_people
from minicn.conditions.networks.hed import HED
from minicn.conditions.networks.mlsd import MLSD, find_lines

__all__ = ["HED", "MLSD", "BodyPose", "find_lines", "find_people"]
