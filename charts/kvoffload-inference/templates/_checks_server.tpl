{{/* The checks of _checks.tpl that are about the server itself. */}}

{{- define "kvo.checkServer" -}}
{{- $args := .Values.vllm.args -}}
{{- if not $args.model -}}
{{- fail "no model is named: set vllm.args.model to a path in the container or a name on Hugging Face" -}}
{{- end -}}
{{- if and (or $args.resumeKvCache $args.resumeKVCache) (or $args.noResumeKvCache $args.noResumeKVCache) -}}
{{- fail "vllm.args.resumeKvCache and noResumeKvCache contradict each other: leave one of them out" -}}
{{- end -}}
{{- if and .Values.service.targetPort (ne (int .Values.service.targetPort) (int $args.port)) -}}
{{- fail (printf "service.targetPort is %v and vllm.args.port is %v: leave targetPort out, it follows the port" .Values.service.targetPort $args.port) -}}
{{- end -}}
{{- if and .Values.service.nodePort (eq .Values.service.type "ClusterIP") -}}
{{- fail "service.nodePort is set but service.type is ClusterIP: leave nodePort out, or set the type to NodePort" -}}
{{- end -}}
{{- include "kvo.checkExtraArgs" . -}}
{{- if and .Values.vllm.lora.runtimeUpdates (not .Values.vllm.lora.enable) -}}
{{- fail "vllm.lora.runtimeUpdates is true but vllm.lora.enable is not: set it, too" -}}
{{- end -}}
{{- if .Values.vllm.lora.enable -}}
{{- $modules := include "kvo.loraModules" . | fromJsonArray -}}
{{- if and (not $modules) (not .Values.vllm.lora.runtimeUpdates) -}}
{{- fail "vllm.lora.enable is true and vllm.lora.modules names no adapter: give name=path, or set vllm.lora.runtimeUpdates" -}}
{{- end -}}
{{- range $modules -}}
{{- if not (regexMatch "^[^=]+=.+$" .) }}{{ fail (printf "vllm.lora.modules has %s: write an adapter as name=path" .) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- $grace := include "kvo.graceSeconds" . | int -}}
{{- $least := include "kvo.leastGrace" . | int -}}
{{- if lt $grace $least -}}
{{- fail (printf "shutdown.gracePeriodSeconds is %d but waiting, postscript, drain and flush take %d: raise it, or leave it out" $grace $least) -}}
{{- end -}}
{{- end }}

{{- define "kvo.checkExtraArgs" -}}
{{- $vllms := list "model" "port" "served-model-name" "tensor-parallel-size" "gpu-memory-utilization" "shutdown-timeout" "kv-transfer-config" -}}
{{- $tiers := list "nvme-path" "dram-kv-offload-gb" "ssd-kv-offload-gb" "ssd-admission" "ssd-write-gb-per-day" "dry-run" -}}
{{- $switches := list "resume-kv-cache" "no-resume-kv-cache" "clean-obsolete-kv-cache" "disable-gpu-reuse" "disable-long-token" "disable-kv-cache" "disable-kv-cache-offload" -}}
{{- range .Values.vllm.args.extraArgs -}}
{{- $name := regexFind "^--[^=]+" . | replace "_" "-" | trimPrefix "--" -}}
{{- if or (regexMatch "^-tp(=|$)" .) (has $name (concat $vllms $tiers $switches)) -}}
{{- fail (printf "vllm.args.extraArgs has %s, which the chart sets: use its own value for it, or leave it out" .) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "kvo.checkNames" -}}
{{- $lists := dict "extraEnv" "kvo.environment" "extraVolumes" "kvo.volumes" -}}
{{- range $extra, $whole := $lists -}}
{{- $names := list -}}
{{- range include $whole $ | fromYamlArray -}}
{{- if has .name $names -}}
{{- fail (printf "%s has %s, which the chart has already: use its own value for it, or another name" $extra .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- end -}}
{{- $user := include "kvo.podSecurity" . | fromJson -}}
{{- if and $user.runAsNonRoot (eq (toString $user.runAsUser) "0") -}}
{{- fail "podSecurityContext.runAsUser is 0 but runAsNonRoot is true, and no container would start: set it to false, too" -}}
{{- end -}}
{{- end }}

{{- define "kvo.checkMounts" -}}
{{- $volumes := dict -}}
{{- range $mount := include "kvo.mounts" . | fromYamlArray -}}
{{- $path := clean $mount.mountPath -}}
{{- with get $volumes $path -}}
{{- fail (printf "two volumes, %s and %s, would be mounted at %s: give one of them another path" . $mount.name $path) -}}
{{- end -}}
{{- $_ := set $volumes $path $mount.name -}}
{{- end -}}
{{- end }}
