"""From a file to frames: the frame that is asked for is the frame that comes back.

`container` opens a local file, `index` lists its displayed frames without decoding, `picture` turns
a decoded frame into upright 8-bit RGB, `pyav_decoder` and `decord_decoder` fetch frames, `reader`
joins them into the one class that the rest of the project uses.
"""

from videodistill.video.container import VideoWarning
from videodistill.video.reader import FrameReader, Frames

__all__ = ["FrameReader", "Frames", "VideoWarning"]
