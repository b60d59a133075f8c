"""What the first bytes of a coded packet tell, without decoding it."""

from __future__ import annotations

from av.packet import Packet

_H264_PICTURE, _H264_IDR = range(1, 6), {5}
_HEVC_PICTURE, _HEVC_IDR = range(32), {19, 20}


def is_shown(codec: str, packet: Packet) -> bool:
    """False for a VP8 or VP9 packet that only holds a reference picture, never displayed.

    VP8: frame tag, bit 4 of the first byte (RFC 6386, 9.1). VP9: uncompressed header: marker (2
    bits), profile (2, and a reserved one in profile 3), show_existing_frame, frame_type,
    show_frame. A VP9 superframe hides such pictures inside a packet and always shows one.
    """
    if codec not in ("vp8", "vp9"):
        return True
    data = memoryview(packet)
    first = data[0]
    if codec == "vp8":
        return bool(first >> 4 & 1)
    if data[-1] & 0xE0 == 0xC0:  # the marker of a superframe index ends the packet
        return True
    show_existing = 2 if first & 0x30 == 0x30 else 3
    return bool(first >> show_existing & 1 or first >> (show_existing - 2) & 1)


def nal_length_size(codec: str, extradata: bytes | None) -> int:
    """Bytes before each NAL unit of H.264 or HEVC that tell its length; 0: not stored that way.

    From the decoder configuration record of ISO/IEC 14496-15 that MP4 and Matroska carry.
    """
    at = {"h264": 4, "hevc": 21}.get(codec)
    if at is None or extradata is None or len(extradata) <= at or extradata[0] != 1:
        return 0
    return (extradata[at] & 3) + 1


def begins_anew(codec: str, packet: Packet, length_size: int) -> bool:
    """Whether a keyframe packet refreshes the decoder: nothing after it needs what was before.

    True for VP8 and VP9 keyframes and for IDR pictures of H.264 and HEVC; False for the keyframes
    of an open GOP or of an intra refresh, and wherever that cannot be told.
    """
    if codec in ("vp8", "vp9"):
        return True
    if not length_size:
        return False
    data, at = memoryview(packet), 0
    while at + length_size < len(data):
        header = data[at + length_size]
        kind = header & 31 if codec == "h264" else header >> 1 & 63
        if kind in (_H264_PICTURE if codec == "h264" else _HEVC_PICTURE):
            return kind in (_H264_IDR if codec == "h264" else _HEVC_IDR)
        at += length_size + int.from_bytes(data[at : at + length_size], "big")
    return False
