"""PEFT adapters in and out, without PEFT: `adapter_config.json` and safetensors."""
