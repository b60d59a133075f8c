"""From a video file and questions to answers, confidences, chosen frames and a picture.

loading.py opens a checkpoint and its encoder, answerer.py answers, graphs.py runs the
head on a GPU, checks.py refuses bad input before any work starts, figure.py draws.
feature_cache.py encodes a corpus once and keeps what the encoder saw.
"""
