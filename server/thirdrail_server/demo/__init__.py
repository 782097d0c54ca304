# SPDX-License-Identifier: Apache-2.0
"""The demo: real models, real inputs, a real server, and what came back beside what was expected.

What happens before and after each model is example code, written to be copied: content_types.py
(Magika), text_boxes.py and text_lines.py (PP-OCR), speech.py (Silero VAD).
"""
