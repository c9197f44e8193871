"""The first stage: takes what gateways published, refuses what breaks the contract, frames the rest."""
