"""What is said in the made-up consultations of `cluster.workload`. Nobody said it: no real patient is in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Complaint:
    """Why somebody came: its name, how they put it, what is found, what is done, and how grave it is (1 to 10)."""

    name: str
    opening: str
    signs: list[str]
    plan: str
    gravity: int


@dataclass(frozen=True)
class Language:
    """The small talk of one language."""

    timezone: str
    complaints: tuple[Complaint, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    findings: tuple[str, ...]


SPANISH = Language(
    timezone="America/Mexico_City",
    complaints=(
        Complaint(
            "Dolor torácico opresivo",
            "Doctora, desde hace una hora siento una presión muy fuerte en el pecho que se me va al brazo.",
            ["dolor irradiado a brazo izquierdo", "diaforesis", "náusea"],
            "Traslado inmediato a urgencias; electrocardiograma y ácido acetilsalicílico 300 mg.",
            10,
        ),
        Complaint(
            "Cefalea tensional",
            "Me duele la cabeza desde hace tres días, sobre todo en la tarde.",
            ["dolor bilateral", "sin fotofobia"],
            "Paracetamol 500 mg cada 8 horas por tres días, higiene del sueño. Cita abierta.",
            3,
        ),
        Complaint(
            "Gastroenteritis aguda",
            "He tenido diarrea y vómito desde el domingo, casi no tolero los líquidos.",
            ["seis evacuaciones al día", "fiebre de 38,2 °C", "mucosas secas"],
            "Vida suero oral, dieta blanda, vigilar datos de deshidratación; revaloración en 48 horas.",
            5,
        ),
        Complaint(
            "Control de diabetes tipo 2",
            "Vengo a mi control, doctor; la glucosa en ayunas me ha salido como en ciento sesenta.",
            ["HbA1c 8,1 %", "sin hipoglucemias"],
            "Ajuste de metformina a 850 mg cada 12 horas; laboratorio en tres meses.",
            4,
        ),
    ),
    questions=(
        "Buenos días, ¿en qué le puedo ayudar?",
        "¿Desde cuándo empezó con esa molestia?",
        "¿Es alérgico a algún medicamento?",
        "¿Del uno al diez, qué tan fuerte es el dolor?",
        "¿Ha tenido fiebre o escalofríos?",
        "Muy bien, voy a revisarle la presión y a escuchar sus pulmones.",
        "¿Alguien más en su casa está enfermo?",
        "¿Qué medicamentos toma todos los días?",
        "Entiendo. ¿Y eso le despierta por la noche?",
    ),
    answers=(
        "Sí, doctora, pero va y viene.",
        "No, que yo sepa no soy alérgico a nada.",
        "Como un seis, a veces un siete.",
        "Tomo losartán por la mañana y nada más.",
        "Anoche me sentí con calentura, pero no me la tomé.",
        "Mi hija también anda igual desde el fin de semana.",
        "Pues… la verdad no he dormido muy bien.",
        "Está bien, muchas gracias.",
        "No, eso no me había pasado antes.",
    ),
    findings=("TA 128/82, FC 76, SatO₂ 97 %", "TA 150/95, FC 98, afebril", "Temp. 38,2 °C, mucosas secas"),
)

ENGLISH = Language(
    timezone="Europe/London",
    complaints=(
        Complaint(
            "Sudden shortness of breath",
            "I can't catch my breath, it came on this morning and my chest hurts when I breathe in.",
            ["pleuritic pain", "heart rate 118", "recent long flight"],
            "Emergency referral for suspected pulmonary embolism.",
            9,
        ),
        Complaint(
            "Sore throat",
            "I've had a really sore throat since Friday and it hurts to swallow.",
            ["no exudate", "no cough", "temperature 37.4 °C"],
            "Fluids and paracetamol; come back if not better in a week.",
            2,
        ),
        Complaint(
            "Lower back pain",
            "My lower back seized up when I was lifting boxes at work.",
            ["no leg weakness", "no numbness", "full bladder control"],
            "Keep active, ibuprofen with food, physiotherapy if not settling in four weeks.",
            3,
        ),
        Complaint(
            "Asthma review",
            "I'm using the blue inhaler most days now, more than I used to.",
            ["wheeze at night", "peak flow 380 l/min"],
            "Step up the preventer inhaler, technique checked, review in eight weeks.",
            5,
        ),
    ),
    questions=(
        "Good morning, how can I help you today?",
        "And how long has this been going on?",
        "Any allergies that you know of?",
        "Could you tell me a bit more about the pain?",
        "Are you taking anything for it at the moment?",
        "Do you smoke, or drink any alcohol?",
        "Right. Let me just have a look at you.",
        "Has anything like this happened before?",
        "Okay, that makes sense.",
    ),
    answers=(
        "Um, about three days, I think.",
        "No, not that I'm aware of.",
        "It's sort of a dull ache, it comes and goes.",
        "Just paracetamol, and it isn't really touching it.",
        "I stopped smoking two years ago.",
        "My mum had something similar.",
        "Yeah, it's been affecting my work a bit.",
        "That's great, thank you, doctor.",
        "It's worse when I lie down.",
    ),
    findings=("BP 122/78, HR 72, SpO₂ 98%", "BP 141/90, HR 104", "Chest clear, abdomen soft"),
)

LANGUAGES = (SPANISH, ENGLISH)
