{{/* What values.schema.json cannot say: values that contradict each other. Each ends the rendering with one sentence. */}}

{{- define "kvo.checks" -}}
{{- include "kvo.checkServer" . -}}
{{- include "kvo.checkMounts" . -}}
{{- include "kvo.checkResources" . -}}
{{- include "kvo.checkCache" . -}}
{{- include "kvo.checkNames" . -}}{{- /* after what says that a volume lacks its claim */ -}}
{{- include "kvo.checkReplicas" . -}}
{{- include "kvo.checkCluster" . -}}
{{- end }}

{{- define "kvo.checkResources" -}}
{{- $gpus := int .Values.vllm.args.tensorParallelSize -}}
{{- $resources := default dict .Values.resources -}}
{{- $parallel := regexMatch "(^| )(-dp|--data[-_]parallel[-_]size)" (join " " (default list .Values.vllm.args.extraArgs)) -}}
{{- if and $parallel .Values.gpuResource (not .Values.resourceClaims) (not (include "kvo.gpus" (list . (default dict $resources.limits)))) -}}
{{- fail (printf "vllm.args.extraArgs asks for data parallelism: name in resources.limits how many %s all its workers take" .Values.gpuResource) -}}
{{- end -}}
{{- range $which := list "requests" "limits" -}}
{{- $named := include "kvo.gpus" (list $ (get $resources $which | default dict)) -}}
{{- if and $named (ne $named (toString $gpus)) (not $parallel) -}}
{{- fail (printf "resources.%s name %s GPUs and vllm.args.tensorParallelSize is %d: they must be equal" $which $named $gpus) -}}
{{- end -}}
{{- with get (get $resources $which | default dict) "memory" -}}
{{- $tiers := include "kvo.tierBytes" $ | float64 -}}
{{- if le (include "kvo.bytes" . | float64) $tiers -}}
{{- fail (printf "resources.%s.memory is %v but the cache alone takes %s of it: raise it, lower vllm.args.dramKvOffloadGb, or leave it out" $which . (include "kvo.gi" $tiers)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $limits := default dict $resources.limits -}}
{{- range $name, $count := $resources.requests -}}
{{- if and (contains "/" $name) (ne (toString $count) (get $limits $name | toString)) -}}
{{- fail (printf "resources.requests has %s: %v, and resources.limits has not: name it there alike, Kubernetes gives no devices otherwise" $name $count) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "kvo.checkCache" -}}
{{- $cache := .Values.kvCache -}}
{{- $type := include "kvo.cacheType" . -}}
{{- $paths := include "kvo.nvmePaths" . | fromJsonArray | len -}}
{{- $gb := include "kvo.ssdGb" . | float64 -}}
{{- if and (lt $gb 0.0) (ne $gb -1.0) -}}
{{- fail "vllm.args.ssdKvOffloadGb must be 0 (off), -1 (what is free) or more than 0" -}}
{{- end -}}
{{- if and (eq $type "none") (or .Values.vllm.args.ssdAdmission .Values.vllm.args.ssdWriteGbPerDay) -}}
{{- fail "vllm.args.ssdAdmission or ssdWriteGbPerDay is set but there is no SSD tier: set ssdKvOffloadGb, or leave them out" -}}
{{- end -}}
{{- if and (eq $gb -1.0) (eq $type "emptyDir") -}}
{{- fail "vllm.args.ssdKvOffloadGb is -1, but a pod whose emptyDir outgrows its limit is evicted: give the cap in GB" -}}
{{- end -}}
{{- if and (eq $gb -1.0) (has $type (list "claimTemplate" "ephemeral")) (not $cache.size) -}}
{{- fail "vllm.args.ssdKvOffloadGb is -1, what is free on the volume: say by kvCache.size how large the volume is" -}}
{{- end -}}
{{- if and $cache.size (gt $gb 0.0) -}}
{{- $bytes := include "kvo.bytes" $cache.size | float64 -}}
{{- $room := mulf (subf $bytes (min (mulf $bytes 0.02 | int64) 10737418240)) $paths -}}
{{- $replicas := ternary (include "kvo.replicas" . | int) 1 (eq $type "existingClaim") -}}
{{- if gt (mulf $gb 1e9 $replicas) $room -}}
{{- fail (printf "vllm.args.ssdKvOffloadGb is %v GB for %d replica(s) on a volume, more than kvCache.size %s leaves on %d of them: raise the size, or leave it out" $gb $replicas $cache.size $paths) -}}
{{- end -}}
{{- end -}}
{{- range $which, $named := dict "existingClaim" $cache.existingClaims "hostPath" $cache.hostPaths -}}
{{- if and $named (not (has $type (list $which "none"))) -}}
{{- fail (printf "kvCache.%ss is given but kvCache.type is %s: set the type to %s, or leave them out" $which $type $which) -}}
{{- end -}}
{{- if and (eq $type $which) (ne (len (default list $named)) $paths) -}}
{{- fail (printf "kvCache.%ss names %d and vllm.args.nvmePath %d: give one for each path" $which (len $named) $paths) -}}
{{- end -}}
{{- end -}}
{{- if and $cache.fixPermissions (has $type (list "none" "devicePlugin")) -}}
{{- fail "kvCache.fixPermissions is true but the chart mounts no volume for the cache: leave it out" -}}
{{- end -}}
{{- end }}

{{- define "kvo.replicas" -}}
{{- $scaling := .Values.autoscaling -}}
{{- ternary (int $scaling.maxReplicas) (int .Values.deployment.replicas) (or $scaling.hpa.enabled $scaling.keda.enabled) -}}
{{- end }}

{{- define "kvo.checkReplicas" -}}
{{- $type := include "kvo.cacheType" . -}}
{{- $kind := include "kvo.kind" . -}}
{{- $several := gt (include "kvo.replicas" . | int) 1 -}}
{{- if and $several (eq $type "existingClaim") (ne .Values.kvCache.accessMode "ReadWriteMany") -}}
{{- fail (printf "a claim that is %s serves one node or pod and not several replicas: use kvCache.type claimTemplate, or a ReadWriteMany claim" .Values.kvCache.accessMode) -}}
{{- end -}}
{{- if and (eq $type "claimTemplate") (eq $kind "Deployment") -}}
{{- fail "kvCache.type claimTemplate needs deployment.kind StatefulSet: leave the kind out, or use kvCache.type ephemeral" -}}
{{- end -}}
{{- if and $several (eq $kind "Deployment") (has $type (list "existingClaim" "hostPath")) -}}
{{- fail "several replicas of a Deployment would use the same folder: leave deployment.kind out" -}}
{{- end -}}
{{- if and .Values.autoscaling.hpa.enabled .Values.autoscaling.keda.enabled -}}
{{- fail "autoscaling.hpa and autoscaling.keda are both enabled and would work against each other: enable one of them" -}}
{{- end -}}
{{- if lt (int .Values.autoscaling.maxReplicas) (int .Values.autoscaling.minReplicas) -}}
{{- fail "autoscaling.maxReplicas is less than autoscaling.minReplicas: raise it" -}}
{{- end -}}
{{- end }}

{{- define "kvo.checkCluster" -}}
{{- $name := include "kvo.name" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "a Service cannot be called %s: give deployment.name, of small letters, digits and dashes, a letter first" $name) -}}
{{- end -}}
{{- if semverCompare "<1.31.0-0" .Capabilities.KubeVersion.Version -}}
{{- if .Values.modelImage.reference }}{{ fail "modelImage needs Kubernetes 1.31 or newer: copy the model in a prescript instead" }}{{ end -}}
{{- if .Values.resourceClaims }}{{ fail "resourceClaims need Kubernetes 1.31 or newer: name GPUs in resources instead" }}{{ end -}}
{{- end -}}
{{- if and .Values.metrics.serviceMonitor.enabled .Values.metrics.podMonitor.enabled -}}
{{- fail "metrics.serviceMonitor and metrics.podMonitor are both enabled and would count everything twice: enable one of them" -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) }}{{ fail "ingress.enabled is true but ingress.hosts is empty: name a host" }}{{ end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.enabled is true but httpRoute.parentRefs is empty: name a Gateway" -}}
{{- end -}}
{{- end }}
