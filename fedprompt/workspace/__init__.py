"""What a participant of an experiment holds.

experiment      `Workspace`: the frozen CLIP, the method, and everything below
images          which images this process may read, and which client holds which
"""

from fedprompt.workspace.experiment import Workspace, check_private

__all__ = ["Workspace", "check_private"]
