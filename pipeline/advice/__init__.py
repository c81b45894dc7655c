"""Which rule suits a run's principals, from games over tokens that were recorded on a few prompts."""
