// Classes of mitotic figures: a slide and its detections in; GeoJSON for QuPath, a table and a summary out.
// params.midoglora_container: the image of integrations/Dockerfile by its digest, REGISTRY/midog-lora-slides@sha256:...
process MIDOGLORA_SLIDES {
    tag "$meta.id"
    label 'process_medium'
    label 'process_gpu' // give it an accelerator and containerOptions as in README.md; runs without too

    container "${params.midoglora_container}"
    // the image begins with its own program, which would take Nextflow's for an option; Singularity's exec does not
    containerOptions "${workflow.containerEngine in ['docker', 'podman'] ? "--entrypoint ''" : ''}"

    input:
    tuple val(meta), path(slide), path(detections) // slide: the file, or it and what lies beside it (MIRAX, DICOM)

    output:
    tuple val(meta), path("${prefix}.classes.geojson"), emit: geojson
    tuple val(meta), path("${prefix}.classes.csv")    , emit: csv
    tuple val(meta), path("${prefix}.summary.csv")    , emit: summary
    tuple val(meta), path("${prefix}.not_scored.txt") , emit: not_scored
    path "versions.yml"                               , emit: versions

    when:
    task.ext.when == null || task.ext.when

    script:
    prefix = task.ext.prefix ?: "${meta.id}"
    def args = task.ext.args ?: ''
    def file = slide instanceof List ? slide[0] : slide
    // paths come escaped; .classes: the detections themselves may be called PREFIX.geojson or PREFIX.csv
    """
    status=0
    python -m inference slides ${detections} --slide ${file} --output "${prefix}.classes.geojson" \\
        --csv "${prefix}.classes.csv" --summary "${prefix}.summary.csv" ${args} 2> messages.txt || status=\$?
    cat messages.txt >&2
    grep '^not scored: ' messages.txt > "${prefix}.not_scored.txt" || true
    # 3: some objects could not be scored. They are named, all others are in the results, and another try changes nothing
    if [ \$status -ne 0 ] && [ \$status -ne 3 ]; then exit \$status; fi

    cat <<-END_VERSIONS > versions.yml
    "${task.process}":
        midog-lora: \$(python -m inference --version | sed 's/.* //')
    END_VERSIONS
    """

    stub:
    prefix = task.ext.prefix ?: "${meta.id}"
    """
    touch "${prefix}.classes.geojson" "${prefix}.classes.csv" "${prefix}.summary.csv" "${prefix}.not_scored.txt"
    echo '"${task.process}": {midog-lora: stub}' > versions.yml
    """
}
