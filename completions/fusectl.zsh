
#compdef fusectl

_fusectl_completion() {
  eval $(env _TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" _FUSECTL_COMPLETE=complete_zsh fusectl)
}

compdef _fusectl_completion fusectl

