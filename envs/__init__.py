"""Environments, by the names under which gymnasium makes them: `gymnasium.make("envs:clawrl/ToolCall-v0")`."""

import gymnasium

gymnasium.register("clawrl/ToolCall-v0", entry_point="envs.toolcall.env:ToolCallEnv", order_enforce=False)
gymnasium.register("clawrl/Terminal-v0", entry_point="envs.terminal.env:TerminalEnv", order_enforce=False)
gymnasium.register("clawrl/Drill-v0", entry_point="envs.terminal.drill:DrillEnv", order_enforce=False)
gymnasium.register("clawrl/Gui-v0", entry_point="envs.gui.env:GuiEnv", order_enforce=False)
gymnasium.register("clawrl/Swe-v0", entry_point="envs.swe.env:SweEnv", order_enforce=False)
gymnasium.register("clawrl/Mcp-v0", entry_point="envs.toolcall.mcp_env:McpEnv", order_enforce=False)
gymnasium.register("clawrl/Python-v0", entry_point="envs.toolcall.python_env:PythonEnv", order_enforce=False)
gymnasium.register("clawrl/Bfcl-v0", entry_point="envs.toolcall.bfcl:BfclEnv", order_enforce=False)
