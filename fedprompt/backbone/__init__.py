"""The frozen CLIP, and the ways of prompts through its towers."""
