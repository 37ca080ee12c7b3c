{{/* What an upgrade cannot do, said before Kubernetes says it less plainly. Without a cluster (helm template) nothing is looked up. */}}

{{- define "kvo.checkClaims" -}}
{{- $name := include "kvo.name" . -}}
{{- $found := lookup "apps/v1" "StatefulSet" .Release.Namespace $name -}}
{{- if and $found (eq (include "kvo.kind" .) "StatefulSet") -}}
{{- $made := list -}}
{{- if eq (include "kvo.cacheType" .) "claimTemplate" }}{{ $made = include "kvo.claimTemplates" . | fromYamlArray }}{{ end -}}
{{- $was := include "kvo.claimsInWords" $found.spec.volumeClaimTemplates -}}
{{- $now := include "kvo.claimsInWords" $made -}}
{{- if ne $was $now -}}
{{- fail (printf "the claims of statefulset/%s cannot change from %s to %s: keep them by kvCache.size and the other values of kvCache and nvmePath, or first kubectl delete statefulset/%s --cascade=orphan" $name $was $now $name) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "kvo.claimsInWords" -}}
{{- $words := list -}}
{{- range . -}}
{{- $class := .spec.storageClassName | default "the default class" -}}
{{- $words = append $words (printf "%s of %s" .metadata.name (list .spec.resources.requests.storage $class (join " " .spec.accessModes) | join " ")) -}}
{{- end -}}
{{- join ", " $words | default "none" -}}
{{- end }}
