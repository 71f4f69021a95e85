"""What a federation cannot do from round to round, refused before anything is trained."""

from __future__ import annotations

from fedprompt.data.partition.pseudo_labels import check_pseudo_labels
from fedprompt.data.partition.sessions import in_session
from fedprompt.errors import UserError
from fedprompt.federation.strategy import SharedPromptStrategy
from fedprompt.privacy.image_epsilon import image_epsilon
from fedprompt.privacy.local_noise import local_epsilon
from fedprompt.workspace import Workspace


def check_federation(workspace: Workspace, strategy: SharedPromptStrategy) -> None:
    """Refuse what the data, the method and the strategy cannot do together.

    Args:
        workspace: the server's own data and method.
        strategy: the run's strategy.

    Raises:
        UserError: something that the config asks for is missing, or has no meaning with the method
            or the strategy.
    """
    config = workspace.config
    has_validation = workspace.partition.has_validation or workspace.validates_locally
    if config.evaluation.select == "best_validation" and not has_validation:
        raise UserError(
            f"evaluation.select=best_validation: {config.partition.file} has no validation "
            "images; write one with 'fedprompt data partition ... "
            "partition.local_validation_fraction=0.2'."
        )
    # Without the accountant, these refuse the run before anything is trained.
    if config.privacy.noise:
        local_epsilon(config.privacy, 0)
    if config.privacy.image_noise:
        image_epsilon(config.privacy, config.training, {}, images=int, steps=True)
    if config.partition.labels_per_round:
        _check_active_learning(workspace, strategy)
    if config.partition.sessions:
        _check_sessions(workspace)
    # With `partition.file`, the config alone does not tell.
    if config.relabel_every and workspace.partition.unlabelled:
        check_pseudo_labels(config)


def _check_active_learning(workspace: Workspace, strategy: SharedPromptStrategy) -> None:
    """Refuse what cannot start again in every active round."""
    rule, plain = type(strategy), SharedPromptStrategy
    kept = (rule.state, rule.changed_client_states)
    if kept != (plain.state, plain.changed_client_states):
        raise UserError(
            f"partition.labels_per_round: strategy '{strategy.name}' keeps something from "
            "round to round, which cannot start again in every active round; use fedavg."
        )
    if not workspace.method.trainable:
        raise UserError(
            f"partition.labels_per_round: method '{workspace.method.name}' trains nothing."
        )


def _check_sessions(workspace: Workspace) -> None:
    """Refuse sessions in which nothing can be learned, before the first one begins."""
    method = workspace.method
    why = method.no_transfer_reason or ("it trains nothing" if not method.trainable else None)
    if why is not None:
        raise UserError(
            f"partition.sessions: method '{method.name}' cannot go on with further classes "
            f"({why}); use a method with text prompts, such as promptfl."
        )
    options, seed = workspace.config.partition, workspace.config.seed
    for session in range(1, options.sessions + 1):
        in_session(options, workspace.dataset, workspace.partition, session, seed)
