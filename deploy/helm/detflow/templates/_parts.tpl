{{/* Parts of several templates. They are put in with `template`, so each brings its own indentation. */}}

{{- define "labels" }}
    app.kubernetes.io/name: detflow
    app.kubernetes.io/instance: {{ .Release.Name }}
    app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
    app.kubernetes.io/managed-by: {{ .Release.Service }}
    helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "image" -}}
{{ .root.Values.image.prefix }}{{ .image }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "podSecurity" }}
      automountServiceAccountToken: false
      enableServiceLinks: false
      securityContext:
        runAsNonRoot: true
        runAsUser: 10001
        runAsGroup: 10001
        fsGroup: 10001
        fsGroupChangePolicy: OnRootMismatch
        seccompProfile: {type: RuntimeDefault}
      {{- if .Values.image.pullSecrets }}
      imagePullSecrets:
        {{- range .Values.image.pullSecrets }}
        - name: {{ . }}
        {{- end }}
      {{- end }}
{{- end }}

{{- define "containerSecurity" }}
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities: {drop: [ALL]}
{{- end }}

{{/* Where the others are, and what every process is told. */}}
{{- define "addresses" }}
            {{- range $name, $service := .Values.services }}
            - {name: DETFLOW_{{ upper $name }}_ADDRESS, value: "{{ $.Release.Name }}-{{ $name }}:{{ $service.port }}"}
            {{- end }}
            - {name: DETFLOW_SERVICE_TOKEN_FILE, value: /run/secrets/detflow/service_token}
            - {name: DETFLOW_DATA_DIR, value: /data}
            {{- if .Values.tls.secret }}
            - {name: DETFLOW_TLS_CA_FILE, value: /run/secrets/tls/ca.crt}
            - {name: DETFLOW_TLS_CERT_FILE, value: /run/secrets/tls/tls.crt}
            - {name: DETFLOW_TLS_KEY_FILE, value: /run/secrets/tls/tls.key}
            {{- end }}
            {{- if .Values.oidc.issuer }}
            - {name: DETFLOW_OIDC_ISSUER, value: {{ .Values.oidc.issuer | quote }}}
            - {name: DETFLOW_OIDC_CLIENT_ID, value: {{ .Values.oidc.clientId | quote }}}
            {{- end }}
            {{- if .Values.otlpEndpoint }}
            - {name: DETFLOW_OTLP_ENDPOINT, value: {{ .Values.otlpEndpoint | quote }}}
            {{- end }}
            {{- range $name, $value := .Values.environment }}
            - {name: {{ $name }}, value: {{ $value | quote }}}
            {{- end }}
{{- end }}

{{/* Where objects are. */}}
{{- define "store" }}
            - {name: DETFLOW_STORE_URL, value: {{ .Values.store.url | quote }}}
            {{- range $name, $value := .Values.store.environment }}
            - {name: {{ $name }}, value: {{ $value | quote }}}
            {{- end }}
{{- end }}

{{- define "storeSecret" }}
          {{- if .Values.store.secret }}
          envFrom:
            - secretRef: {name: {{ .Values.store.secret }}}
          {{- end }}
{{- end }}

{{- define "mounts" }}
          volumeMounts:
            - {name: data, mountPath: /data}
            - {name: tmp, mountPath: /tmp}
            - {name: secrets, mountPath: /run/secrets/detflow, readOnly: true}
            {{- if .root.Values.tls.secret }}
            - {name: tls, mountPath: /run/secrets/tls, readOnly: true}
            {{- end }}
            {{- if .memory }}
            - {name: memory, mountPath: /dev/shm}
            {{- end }}
{{- end }}

{{/* Of the secrets each pod gets those that it needs. */}}
{{- define "volumes" }}
      volumes:
        - {name: data, emptyDir: {sizeLimit: {{ .part.dataSize }}}}
        - {name: tmp, emptyDir: {sizeLimit: 1Gi}}
        {{- if .memory }}
        - {name: memory, emptyDir: {medium: Memory, sizeLimit: 2Gi}}
        {{- end }}
        - name: secrets
          secret:
            secretName: {{ .root.Values.secret }}
            defaultMode: 0440
            items:
              {{- range .secrets }}
              - {key: {{ . }}, path: {{ . }}}
              {{- end }}
        {{- if .root.Values.tls.secret }}
        - name: tls
          secret: {secretName: {{ .root.Values.tls.secret }}, defaultMode: 0440}
        {{- end }}
{{- end }}

{{- define "placement" }}
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels: {app.kubernetes.io/instance: {{ .root.Release.Name }}, app.kubernetes.io/component: {{ .name }}}
      nodeSelector: {{ toJson .part.nodeSelector }}
      tolerations: {{ toJson .part.tolerations }}
{{- end }}
