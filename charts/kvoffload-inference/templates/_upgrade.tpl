{{/* What an upgrade cannot do, said before Kubernetes says it less plainly. Without a cluster (helm template) nothing is looked up. */}}

{{- define "kvo.checkClaims" -}}
{{- $name := include "kvo.name" . -}}
{{- $found := lookup "apps/v1" "StatefulSet" .Release.Namespace $name -}}
{{- if and $found (eq (include "kvo.kind" .) "StatefulSet") -}}
{{- $made := list -}}
{{- if eq (include "kvo.cacheType" .) "claimTemplate" }}{{ $made = include "kvo.claimTemplates" . | fromYamlArray }}{{ end -}}
{{- $had := $found.spec.volumeClaimTemplates -}}
{{- if ne (include "kvo.claimsInWords" (list $had true)) (include "kvo.claimsInWords" (list $made true)) -}}
{{- $was := include "kvo.claimsInWords" (list $had false) -}}
{{- $now := include "kvo.claimsInWords" (list $made false) -}}
{{- fail (printf "the claims of statefulset/%s cannot change from %s to %s: keep them by kvCache.size and the other values of kvCache and nvmePath, or first kubectl delete statefulset/%s --cascade=orphan" $name $was $now $name) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* (list claims true) with sizes in bytes, to compare: Kubernetes writes 1024Gi as 1Ti; (list claims false) for a reader */}}
{{- define "kvo.claimsInWords" -}}
{{- $inBytes := index . 1 -}}
{{- $words := list -}}
{{- range index . 0 -}}
{{- $size := .spec.resources.requests.storage -}}
{{- if $inBytes }}{{ $size = include "kvo.bytes" $size }}{{ end -}}
{{- $class := .spec.storageClassName | default "the default class" -}}
{{- $words = append $words (printf "%s of %s" .metadata.name (list $size $class (join " " .spec.accessModes) | join " ")) -}}
{{- with .metadata.annotations }}{{ $words = append $words (printf "annotated %s" (toJson .)) }}{{ end -}}
{{- end -}}
{{- join ", " $words | default "none" -}}
{{- end }}
