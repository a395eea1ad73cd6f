# Completes "distilbench train ..." and "python -m distilbench.train ..." in bash and zsh, by asking Hydra:
# eval "$(distilbench completion)", or eval "$(python -m distilbench completion)".
[ -z "$ZSH_VERSION" ] || { autoload -Uz compinit bashcompinit && compinit -u && bashcompinit; }
_distilbench() {
    local line="${COMP_LINE:0:$COMP_POINT}" ask rest word choices others
    word="${line##* }"
    case "$line" in
        *" -m distilbench."*" "*) rest="${line#* -m distilbench.}" ;;
        *"distilbench "*" "*) rest="${line#*distilbench }" ;;
        *"distilbench "*)
            COMPREPLY=($(compgen -W "train compare confirm predict benchmark completion" -- "$word"))
            return ;;
        *) return ;;
    esac
    ask="${line%"$rest"}${rest%% *}"
    choices="$(COMP_LINE="app ${rest#* }" COMP_POINT=$COMP_POINT $ask -sc query=bash 2>/dev/null)"
    others="adapter|data|engine|freeze|model|optim|scheduler|search"  # groups, which a training alone has
    case "$rest" in
        compare*) choices="$(echo "$choices" | tr " " "\n" | grep -vxE "($others)=")" ;;
        confirm*|predict*) choices="$(echo "$choices" | tr " " "\n" | grep -vxE "($others|experiment)=")" ;;
    esac
    COMPREPLY=($(compgen -W "$choices" -- "$word"))
    case "$BASH_VERSION$word" in  # bash breaks words at = and replaces the last part alone
        [0-9]*=*) COMPREPLY=("${COMPREPLY[@]#"${word%=*}="}") ;;
    esac
}
complete -o nospace -o default -F _distilbench distilbench python python3
